"""The interception where somebody else reads: hooks, functions of a user's own, activations that are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from tests.against_dense import armed, assert_dense_gradients, squares
from tests.models import PreActivation, Residual, normal, relative_error, seeded

pytestmark = [
    # PyTorch's own: it pads strings of even kernels by a copy.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("no_mode_stays_behind"),
]


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.parametrize("where", ["stem.0", "stem.1", "stem.2", "blocks.0.conv1", "blocks.0.bn1", "blocks.1"])
def test_a_users_hook_keeps_the_activation_that_pytorch_would_show_it(where: str, before: bool) -> None:
    model, x = seeded(lambda: Residual(inplace=False)).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    with torch.no_grad():
        handle = model.get_submodule(where).register_forward_hook(hook)
        model(x)
        expected = kept[0]
        kept.clear()
    if not before:
        handle.remove()
    tuner = armed(model, x)
    kept.clear()
    if not before:
        handle = model.get_submodule(where).register_forward_hook(hook)
    model(x)
    assert relative_error(kept[-1], expected) < 1e-12
    kept.clear()
    handle.remove()
    tuner.finish()


def test_a_hook_that_takes_the_place_of_an_old_one_is_noticed() -> None:
    model, x = seeded(lambda: Residual(inplace=False)).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = model.stem[0](x)
    old = model.stem[2].register_forward_hook(lambda *_: None)
    tuner = armed(model, x)
    old.remove()
    kept: list[Tensor] = []
    handle = model.stem[0].register_forward_hook(lambda module, args, output: kept.append(output))
    model(x)
    assert relative_error(kept[0], expected) < 1e-12
    handle.remove()
    tuner.finish()


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_backward_hook_sees_the_gradient_of_its_own_module(before: bool) -> None:
    model, x = seeded(lambda: Residual(inplace=False)).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, outputs: tuple[Tensor]) -> None:
        seen.append(outputs[0].clone())

    dense = copy.deepcopy(model)
    dense.blocks[0].conv1.register_full_backward_hook(hook)
    squares(x)(dense).backward()
    expected = seen.pop()
    if before:
        model.blocks[0].conv1.register_full_backward_hook(hook)
    tuner = armed(model, x)
    if not before:
        model.blocks[0].conv1.register_full_backward_hook(hook)
    squares(x)(model).backward()
    assert relative_error(seen.pop(), expected) < 1e-10
    tuner.finish()


class Custom(torch.autograd.Function):
    """A user's own operation, with a convolution inside and its output kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, y = ctx.saved_tensors
        assert torch.equal(y, F.conv2d(x, weight))
        return (
            conv2d_input(x.shape, weight, gradient),
            conv2d_weight(x, weight.shape, gradient),
        )


class WithCustom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.custom = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(Custom.apply(x, self.custom)) + F.relu(x)
        return self.head(x.mean((2, 3)))


def test_a_users_autograd_function_is_left_alone() -> None:
    model, x = seeded(WithCustom).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    assert tuner.plan.table.names == ("first",)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


class Retains(nn.Module):
    """Keeps what it computed: as an attribute, and with its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv1(x)
        return self.head(F.relu(self.norm(self.conv2(F.relu(self.kept)))).mean((2, 3)))


def test_an_activation_that_the_model_keeps_stays_what_it_was() -> None:
    model, x = seeded(Retains).double().eval(), normal(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model.conv1(x)
    tuner = armed(model, x)
    y = model(x)
    kept = model.kept
    assert kept is not None
    kept.retain_grad()
    y.sum().backward()
    assert relative_error(kept, expected) < 1e-12
    assert kept.grad is not None
    model.kept = None
    assert_dense_gradients(model, tuner, lambda m: m(x).sum())
    tuner.finish()


def test_gradients_that_a_user_keeps_are_never_written_into() -> None:
    """``register_hook`` hands out the very tensor that the backward pass goes on with."""
    model, x = seeded(PreActivation).double(), normal(2, 3, 9, 9, dtype=torch.float64)
    model.eval()

    def run(net: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(seen.append)

        handles = [m.register_forward_hook(watch) for m in net.modules() if isinstance(m, nn.Conv2d)]
        squares(x)(net).backward()
        for handle in handles:
            handle.remove()
        return seen

    expected = run(copy.deepcopy(model))
    tuner = armed(model, x)
    found = run(model)
    assert len(found) == len(expected)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(found, expected, strict=True))
    tuner.finish()
