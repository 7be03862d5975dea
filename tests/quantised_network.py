"""A small network whose linear layers are stored quantised, and its dense twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trady
from tests.against_dense import gradients
from tests.models import normal, relative_error, seeded

KINDS = ["torchao-8", "torchao-4", "bitsandbytes-8", "bitsandbytes-4"]
WIDTH = 64
X, Y = normal(12, 5, WIDTH), torch.arange(12) % 3


class Block(nn.Module):
    """The addition hands one gradient tensor to both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """Plain layers in front of and behind blocks that will be quantised."""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(torch.relu(self.last(x)).mean(1))


def network(checkpoints: bool = False) -> Network:
    return seeded(lambda: Network(checkpoints))


def quantised(kind: str, model: Network) -> Any:
    """The blocks of a model stored in 8 or 4 bits."""
    library, bits = kind.split("-")
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        config = quantization.Int8WeightOnlyConfig()
        if bits == "4":
            group = quantization.PerGroup(16)
            config = quantization.IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=group)
        quantization.quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and "blocks" in name)
        return model
    modules = pytest.importorskip("bitsandbytes").nn
    for parent in [m for name, m in model.named_modules() if isinstance(m, Block)]:
        for name in ("up", "down"):
            plain, options = getattr(parent, name), {"bias": getattr(parent, name).bias is not None}
            sizes = plain.in_features, plain.out_features
            if bits == "8":
                stored = modules.Linear8bitLt(*sizes, has_fp16_weights=False, **options)
            else:
                stored = modules.Linear4bit(*sizes, quant_type="nf4", **options)
                stored.support_avx512bf16_for_cpu = False
            stored.to(plain.weight.dtype).load_state_dict(plain.state_dict())
            setattr(parent, name, stored.to("cpu"))
    return model


def dequantised(model: Any) -> nn.Module:
    """A plain network with the values that the weights stand for, made without trady."""
    dense = network().to(next(model.head.parameters()).dtype)
    with torch.no_grad():
        for (name, plain), stored in zip(dense.named_modules(), model.modules(), strict=True):
            if not isinstance(plain, nn.Linear):
                continue
            if type(stored) is nn.Linear and type(stored.weight) is nn.Parameter:
                plain.weight.copy_(stored.weight)
            elif type(stored) is nn.Linear:
                plain.weight.copy_(stored.weight.dequantize())
            else:  # the library's own product of the unit vectors
                bias = 0 if stored.bias is None else stored.bias.float()
                eye = torch.eye(plain.in_features, dtype=plain.weight.dtype)
                plain.weight.copy_((stored.train()(eye).float() - bias).t())
            assert name
    return dense.train(model.training)


def loss(x: Tensor = X, y: Tensor = Y) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.cross_entropy(model(x).float(), y)


def quantised_layers(tuner: trady.Tuner) -> list[str]:
    return [layer.name for layer in tuner.plan.table if layer.quantized]


def assert_gradients(tuner: trady.Tuner, expected: dict[str, Tensor], error: float) -> None:
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name].float(), gradient.float()) < error, name


def train(model: nn.Module, tuner: trady.Tuner, optimizer: torch.optim.Optimizer, epochs: range, parts: int) -> None:
    for epoch in epochs:
        tuner.resample(epoch)
        for _ in range(2):
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                (loss(x, y)(model) / parts).backward()
            if not isinstance(optimizer, trady.optim.SGD | trady.optim.AdamW):
                tuner.clip_gradients(0.5)
            optimizer.step()
            optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "in backward": lambda p: trady.optim.AdamW(p, lr=1e-2, weight_decay=0.1, channel_clip=0.5),
}
