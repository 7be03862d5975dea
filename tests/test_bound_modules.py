"""Modules that make one call are answered in their own forward while a pass follows the plan, and at no other time."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import trady
from trady.interception import bound_modules


class Network(nn.Module):
    """Layers of every kind that is answered for; one activation serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1)
        self.relu, self.smooth, self.leaky = nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.1)
        self.rows, self.scaled = nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.leaky(self.wide(self.relu(self.second(x))))
        x = x.mean((2, 3))
        x = x + self.smooth(self.rows(self.scaled(x)))
        out: Tensor = self.head(x)
        return out


@pytest.fixture
def armed() -> Iterator[tuple[nn.Module, Tensor, trady.Tuner]]:
    torch.manual_seed(0)
    model, x = Network(), torch.randn(4, 3, 8, 8)
    tuner = trady.prepare(model, x, budget="elements:300", policy="dynamic-random", seed=0)
    model.train()
    yield model, x, tuner
    tuner.finish()


def gradients(model: nn.Module, x: Tensor, tuner: trady.Tuner) -> dict[str, Tensor]:
    for parameter in tuner.parameters():
        parameter.grad = None
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in tuner.named_parameters() if p.grad is not None}


def answered(model: nn.Module) -> list[str]:
    """Modules that have a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_pass_answered_in_the_modules_has_the_same_gradients(armed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, tuner = armed
    asked = gradients(model, x, tuner)  # the first pass asks every call
    computed = []
    before = bound_modules._BoundForward._computed

    def noted(self: Any, *call: Any) -> Any:
        out = before(self, *call)
        computed.append((type(self.module).__name__, out is not NotImplemented))
        return out

    monkeypatch.setattr(bound_modules._BoundForward, "_computed", noted)
    found = gradients(model, x, tuner)
    assert found.keys() == asked.keys()
    assert len(found) > 3
    assert all(torch.equal(found[name], asked[name]) for name in found)
    done = {kind for kind, was in computed if was}
    assert done == {"Conv2d", "BatchNorm2d", "ReLU", "LeakyReLU", "Linear", "LayerNorm", "GELU"}


def test_nothing_is_left_behind(armed: Any) -> None:
    model, x, tuner = armed
    hooks = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    for _ in range(2):
        gradients(model, x, tuner)
        assert answered(model) == []
        assert {name: list(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_is_interrupted_is_put_right_at_the_next_call(
    armed: Any, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, tuner = armed
    before = gradients(model, x, tuner)

    def interrupts(*args: Any, **kwargs: Any) -> Tensor:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "mean", interrupts)
        with pytest.raises(kind):
            model(x)
    if kind is KeyboardInterrupt:  # nobody hears of it: copies and files must be as ever
        assert answered(model)
        copied = copy.deepcopy(model)
        assert copied.rows.forward.__self__ is copied.rows
        torch.save(model, io.BytesIO())
    alone = model.rows(torch.randn(2, 16))  # a module that was answered for is the first that is called again
    assert alone.requires_grad == any(name == "rows" for name in tuner.selection.channels)
    assert answered(model) == []
    after = gradients(model, x, tuner)
    assert all(torch.equal(before[name], after[name]) for name in before)


class _Counts(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_another_mode_still_sees_every_call(armed: Any) -> None:
    model, x, tuner = armed
    before = gradients(model, x, tuner)
    gradients(model, x, tuner)
    with _Counts() as counts:
        found = gradients(model, x, tuner)
    assert F.layer_norm in counts.seen
    assert all(torch.equal(before[name], found[name]) for name in before)


def test_what_a_module_has_become_meanwhile_counts(armed: Any) -> None:
    model, x, tuner = armed
    for _ in range(2):
        gradients(model, x, tuner)
    before = model(x)
    model.scaled.eps, model.scaled.weight.data[0] = 10.0, 3.0
    with tuner.untouched():
        model.norm.eval()  # its statistics are fixed in training
        expected = model(x)
        model.norm.train()
    assert not torch.allclose(before, expected, atol=1e-3)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_forward_that_somebody_has_put_there_stays(armed: Any) -> None:
    model, x, tuner = armed
    before = gradients(model, x, tuner)
    own, calls = model.rows.forward, []

    def forward(x: Tensor) -> Tensor:
        calls.append(x.shape)
        out: Tensor = own(x)
        return out

    model.rows.forward = forward
    for _ in range(2):
        found = gradients(model, x, tuner)
    assert len(calls) == 2
    assert model.rows.forward is forward
    assert all(torch.equal(before[name], found[name]) for name in before)


def test_hooks_of_the_loop_run(armed: Any) -> None:
    model, x, tuner = armed
    for _ in range(2):
        gradients(model, x, tuner)
    seen: list[str] = []
    handles = [
        model.rows.register_forward_hook(lambda *_: seen.append("after")),
        model.rows.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    gradients(model, x, tuner)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    gradients(model, x, tuner)
    assert seen == ["before", "after"]
