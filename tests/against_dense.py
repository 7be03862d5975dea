"""Every channel of a model armed, and its gradients held against those of the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import trady
from tests.models import channels_of, freeze_norms, relative_error

EVERYTHING = "elements:100000000"


def armed(model: nn.Module, example: Any, **options: Any) -> trady.Tuner:
    """Every channel of every layer trains."""
    return trady.prepare(model, example, **{"budget": EVERYTHING, "policy": "full", **options})


def gradients(tuner: trady.Tuner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in tuner.named_parameters() if p.grad is not None}


def dense_gradients(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The gradients of the plain model, in the form of ``named_parameters()``."""
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    dense.zero_grad()
    loss(dense).backward()
    named = dict(dense.named_parameters())
    found = {}
    for layer in tuner.plan.table:
        channels = tuner.selection.channels.get(layer.name)
        if channels is not None and named[layer.parameter].grad is not None:
            found[f"{layer.parameter}.channels"] = channels_of(named[layer.parameter].grad, layer, channels)
    head = {n: named[n].grad for n, _ in tuner.named_parameters() if n in named}
    return found | {name: gradient for name, gradient in head.items() if gradient is not None}


def assert_dense_gradients(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> None:
    expected = dense_gradients(model, tuner, loss)
    tuner.model.zero_grad()
    for parameter in tuner.parameters():
        parameter.grad = None
    loss(model).backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-10, name


def squares(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).square().sum()
