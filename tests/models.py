"""Small networks, each with one thing that an interception can get wrong, and the dense model beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import trady
from trady.ops.selected import gather_channels

Network = TypeVar("Network", bound=nn.Module)


def seeded(build: Callable[[], Network], seed: int = 0) -> Network:
    """Build a network with fixed weights and with statistics as training would leave them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0, 0.3)
    return model


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that depend on nothing but shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Residual(nn.Module):
    """Basic blocks as in ResNet: the addition hands one gradient tensor to both branches."""

    stem: Any
    blocks: Any

    def __init__(self, width: int = 8, blocks: int = 2, classes: int = 5, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(*(BasicBlock(width, inplace) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.pool(self.stem(x))).mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, width: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class PreActivation(nn.Module):
    """Pre-activation blocks: normalisation and ReLU read what the shortcut reads again."""

    def __init__(self, width: int = 8, blocks: int = 2, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(
                nn.Sequential(
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                )
            )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.relu(x).mean((2, 3)))


class ReadTwice(nn.Module):
    """``x + relu(x)``: an activation whose input is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + F.relu(x)
        y = self.norm(x)
        y = F.leaky_relu(y, 0.1) + y
        z = self.second(y)
        z = F.hardtanh(z) * z
        return self.head((z + F.relu6(z)).mean((2, 3)))


class SharedLayer(nn.Module):
    """The same convolution, norm and activation called three times."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.act(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))


class SharedWeight(nn.Module):
    """Two modules with one weight, at two resolutions."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.right = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.right.weight = self.left.weight
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(
            (F.relu(self.left(x)) + self.right(F.max_pool2d(x, 2)).mean((2, 3), keepdim=True)).mean((2, 3))
        )


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, also with a channel multiplier, and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(12)
        self.multiplied = nn.Conv2d(12, 24, 3, padding="same", groups=12)
        self.point = nn.Conv2d(24, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu6(self.norm(self.grouped(x)))
        x = x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
        x = F.relu6(self.depthwise_norm(self.depthwise(x)))
        x = F.leaky_relu(self.multiplied(x), 0.2)
        return self.head(self.point(x).mean((2, 3)))


class StaticSame(nn.Conv2d):
    """A subclass that pads in ``forward``, more on one side than on the other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def padded() -> nn.Module:
    """Padding in front of a convolution: by a subclass, by a module, as a string, even and odd kernels."""
    return nn.Sequential(
        StaticSame(3, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.ZeroPad2d((2, 1, 0, 3)),
        nn.Conv2d(6, 8, 4, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, padding="same", dilation=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, stride=2, padding=2),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(6, 8, 3, padding="same", dilation=2, groups=2),
        nn.LeakyReLU(0.1),
        nn.AvgPool1d(2, padding=1),
        nn.Conv1d(8, 8, 1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(4, 6, (1, 3, 3), groups=2),
        nn.ReLU6(),
        nn.AvgPool3d((2, 2, 1), ceil_mode=True),
        nn.Conv3d(6, 6, 1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def perceptron() -> nn.Module:
    """Linear layers with normalisation, activation and dropout."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(48, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(16, 12),
        nn.Hardtanh(-0.5, 0.5),
        nn.Linear(12, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.Linear(12, 4),
    )


class Tokens(nn.Module):
    """transformers' ``Conv1D`` (``addmm``), GELU, LayerNorm and an embedding: mostly operations that are not lean."""

    def __init__(self, width: int = 12, vocabulary: int = 20) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.up = Conv1D(3 * width, width)
        self.down = Conv1D(width, 3 * width)
        nn.init.normal_(self.up.bias, 0, 0.3)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x + torch.sigmoid(self.mix(x))
        return self.head(x.mean(1) if mask is None else (x * mask.unsqueeze(-1)).sum(1))


class Dense(nn.Module):
    """DenseNet's concatenations: every activation is read by several layers."""

    def __init__(self, growth: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(6 + i * growth, growth, 3, padding=1, bias=False) for i in range(layers))
        self.head = nn.Linear(6 + layers * growth, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            maps.append(conv(F.relu(norm(torch.cat(maps, 1)), inplace=True)))
        return self.head(F.avg_pool2d(torch.cat(maps, 1), 2, ceil_mode=True).mean((2, 3)))


class Functional(nn.Module):
    """No submodules at all: every weight is a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.second = nn.Parameter(torch.randn(8, 6, 3, 3) / 7)
        self.hidden = nn.Parameter(torch.randn(8, 8) / 3)
        self.classifier = nn.Parameter(torch.randn(4, 8) / 3)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first, padding=1))
        x = F.relu(F.conv2d(x, self.second, stride=2)).mean((2, 3))
        return F.linear(torch.relu(F.linear(x, self.hidden)), self.classifier, self.bias)


class Checkpointed(nn.Module):
    """Blocks that are recomputed in the backward pass; ``what`` is ``block``, ``method`` or nothing."""

    def __init__(self, what: str, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.what, self.reentrant = what, reentrant
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(CheckpointedBlock(6, dropout) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.what == "block":
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            elif self.what == "method":
                x = checkpoint(block.forward, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return self.head(x.mean((2, 3)))


class CheckpointedBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        out = self.bn2(self.conv2(self.dropout(out)))
        return F.leaky_relu(out + x, 0.3)


#: Every network with an input that it takes: name -> (build, input shape without the batch).
IMAGE_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 9, 11)),
    "pre-activation": (PreActivation, (3, 9, 7)),
    "read twice": (ReadTwice, (3, 9, 7)),
    "shared layer": (SharedLayer, (3, 7, 7)),
    "shared weight": (SharedWeight, (3, 9, 8)),
    "grouped": (Grouped, (3, 17, 15)),
    "padded": (padded, (3, 15, 13)),
    "conv1d": (one_dimensional, (3, 33)),
    "conv3d": (three_dimensional, (2, 5, 9, 7)),
    "perceptron": (perceptron, (3, 4, 4)),
    "dense": (Dense, (3, 9, 9)),
    "functional": (Functional, (3, 9, 9)),
}


def in_layout(model: Network, layout: torch.memory_format) -> Network:
    """``model.to(memory_format=layout)``, which PyTorch's types do not know of."""
    change: Any = model.to
    return change(memory_format=layout)


def freeze_norms(model: nn.Module) -> None:
    """Put the normalisations into the state that trady trains in: statistics fixed."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.eval()


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def gradient_errors(
    model: nn.Module,
    batch: Any,
    *,
    budget: str = "elements:100000000",
    share: float = 0.4,
    train: bool = True,
    autocast: bool = False,
    fuse: bool = True,
    reference: torch.dtype | None = None,
    policy: Any = "dynamic-random",
    recompute: str = "auto",
) -> dict[str, float]:
    """Hold the gradient of every selected channel, and of the head, against the dense model's.

    Args:
        model: Left as it was, but for gradients.
        batch: A tensor, tuple or dict.
        budget: See ``share``.
        share: Cut the budget to this share of all channels.
        train: In training mode.
        autocast: Run trady's side under bfloat16 autocast.
        fuse: As for ``prepare``.
        reference: Type of the dense model; its own by default.
        policy: As for ``prepare``.
        recompute: As for ``prepare``.

    Returns:
        Relative error of every layer's selected channels and of every parameter of the head; the
        relative error of the output under ``"output"``.

    """
    model.zero_grad()
    dense = copy.deepcopy(model).train(train)
    dense.requires_grad_(True)
    freeze_norms(dense)
    model.train(train)
    if share < 1:
        table = trady.plan(model, batch, budget=budget, policy="full", fuse=fuse, recompute="none").table
        budget = f"elements:{int(share * sum(layer.channels * layer.elements for layer in table)) + 1}"
    tuner = trady.prepare(model, batch, budget=budget, policy=policy, fuse=fuse, recompute=recompute)
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch if isinstance(batch, tuple) else (batch,), {})
    if reference is not None:
        dense.to(reference)
    try:
        torch.manual_seed(3)
        wide = [a.to(reference) if reference is not None and a.is_floating_point() else a for a in args]
        expected = tensor_of(dense(*wide, **kwargs))
        weights = normal(*expected.shape, seed=5, dtype=expected.dtype)
        (expected * weights).sum().backward()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = tensor_of(model(*args, **kwargs))
        (found * weights.to(found.dtype)).sum().backward()
        errors = {"output": relative_error(found, expected)}
        grads = {name: parameter.grad for name, parameter in dense.named_parameters()}
        named = dict(tuner.named_parameters())
        for name, channels in tuner.selection.items():
            layer = tuner.plan.table[name]
            wanted = channels_of(grads[layer.parameter], layer, channels, tuner.selection.outputs.get(name))
            errors[name] = relative_error(named[f"{layer.parameter}.channels"].grad, wanted)
        for name, parameter in model.named_parameters():
            if name in named:
                errors[name] = relative_error(parameter.grad, grads[name])
            elif not parameter.requires_grad:
                assert parameter.grad is None, name
    finally:
        tuner.finish()
    return errors


def channels_of(weight: Tensor | None, layer: trady.Layer, channels: Any, outputs: Any = None) -> Tensor:
    """``W[:, c]`` of the given channels (and outputs), as a compact parameter holds them."""
    from trady.ops.selected import select_channels

    assert weight is not None, "no gradient"
    selected = select_channels(channels, layer.groups, layer.channels // layer.groups, weight.device)
    rows = gather_channels(weight, layer.kind, layer.groups, selected)
    return rows if outputs is None else rows[:, torch.from_numpy(outputs.copy())]


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None, "no gradient"
    assert expected is not None, "no gradient to hold it against"
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "no gradient"
    return tensor.grad


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
