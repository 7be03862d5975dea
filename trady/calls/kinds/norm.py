"""Batch normalisations with running statistics, which stay fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.actions import InPlace
from trady.calls.handling import Handling, labelled, refuse_trained
from trady.calls.kind import Call, CallKind, Keeps, always
from trady.calls.sample_rules import samples_first
from trady.ops.activation import affine_clamp
from trady.ops.frozen_norm import FrozenNorm


@dataclass(frozen=True)
class NormCall(Call):
    """A batch normalisation with running statistics, which trady keeps fixed."""

    norm: FrozenNorm


def _read(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormCall | None:
    if running_mean is None or running_var is None:
        return None  # batch statistics are all this norm has: they cannot be fixed
    return NormCall(input, FrozenNorm(running_mean, running_var, weight, bias, eps))


def _on_meta(call: NormCall) -> Tensor:
    # With batch statistics, which these are not, PyTorch would refuse a single sample.
    return torch.empty_like(call.x)


def _compute(call: NormCall, handling: Handling) -> Tensor | None:
    if handling.in_head(call.norm.weight, call.norm.bias):
        return None
    refuse_trained(call.norm.weight, call.norm.bias)
    scale, shift = handling.scale_and_shift(call.norm)
    action = handling.action if isinstance(handling.action, InPlace) else InPlace(False)
    if action.overwrite or action.clamp is not None:
        handling.commit()
    with labelled("batch_norm" if action.clamp is None else f"batch_norm+{action.clamp.name}"):
        return affine_clamp(call.x, scale, shift, action.clamp, in_place=action.overwrite)


NORM = CallKind(
    NormCall,
    readers={F.batch_norm: _read},
    keeps=lambda call: Keeps.NOTHING,
    handler=_compute,
    samples=samples_first,
    overwrites_input=True,
    frees_result=always,
    on_meta=_on_meta,
)
