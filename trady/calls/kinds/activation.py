"""Piecewise linear activations: one bit an element, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.actions import InPlace
from trady.calls.handling import Handling, labelled, may_be_overwritten
from trady.calls.kind import Bound, Call, CallKind, Keeps
from trady.calls.sample_rules import aligned
from trady.ops.activation import clamp
from trady.ops.bits import Clamp
from trady.ops.layout import is_dense


@dataclass(frozen=True)
class ActivationCall(Call):
    """A piecewise linear activation; ``in_place`` when the model itself asks for it."""

    clamp: Clamp
    in_place: bool


def _relu(input: Tensor, inplace: bool = False) -> ActivationCall:
    return ActivationCall(input, Clamp(0.0), inplace)


def _relu6(input: Tensor, inplace: bool = False) -> ActivationCall:
    return ActivationCall(input, Clamp(0.0, 6.0), inplace)


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> ActivationCall | None:
    return ActivationCall(input, Clamp(float(min_val), float(max_val)), inplace) if min_val < max_val else None


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> ActivationCall:
    return ActivationCall(input, Clamp(0.0, math.inf, float(negative_slope)), inplace)


def _in_place(reader: Callable[..., Any]) -> Callable[..., Any]:
    return partial(reader, inplace=True)


def _compute(call: ActivationCall, handling: Handling) -> Tensor | None:
    planned = isinstance(handling.action, InPlace) and handling.action.overwrite
    if not call.x.is_floating_point():
        return None
    if call.in_place and not planned and not (may_be_overwritten(call.x) and is_dense(call.x)):
        return None
    if planned:
        handling.commit()
    with labelled(call.clamp.name):
        return clamp(call.x, call.clamp, in_place=planned or call.in_place)


def _bind(call: ActivationCall, args: tuple[Any, ...], kwargs: Mapping[str, Any], handling: Handling) -> Bound | None:
    options, named = args[1:], dict(kwargs)
    if not args or args[0] is not call.x or "input" in named:
        return None
    planned = isinstance(handling.action, InPlace) and handling.action.overwrite
    kind, in_place, name = call.clamp, planned or call.in_place, call.clamp.name

    def compute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else None
        if type(x) is not Tensor or args[1:] != options or kwargs != named or not x.is_floating_point():
            return NotImplemented
        if planned:
            handling.commit()
        elif in_place and not (may_be_overwritten(x) and is_dense(x)):
            return NotImplemented
        with labelled(name):
            return clamp(x, kind, in_place=in_place)

    return compute


ACTIVATION = CallKind(
    ActivationCall,
    readers={
        F.relu: _relu,
        torch.relu: _relu,
        torch.Tensor.relu: _relu,
        torch.relu_: _in_place(_relu),
        torch.Tensor.relu_: _in_place(_relu),
        F.relu6: _relu6,
        F.hardtanh: _hardtanh,
        F.hardtanh_: _in_place(_hardtanh),
        F.leaky_relu: _leaky_relu,
        F.leaky_relu_: _in_place(_leaky_relu),
    },
    keeps=lambda call: Keeps.NOTHING,
    handler=_compute,
    bind=_bind,
    samples=aligned,
    overwrites_input=True,
)
