"""Smooth activations: exact as PyTorch computes them, or with their derivative in a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.handling import Handling, labelled, may_be_overwritten
from trady.calls.kind import Call, CallKind, Keeps
from trady.calls.sample_rules import aligned
from trady.ops.layout import is_dense
from trady.ops.smooth import Smooth, bits_for, pays, smooth


@dataclass(frozen=True)
class SmoothCall(Call):
    """A smooth activation; ``in_place`` when the model itself asks for it."""

    kind: Smooth
    in_place: bool = False


def _read(name: str, input: Tensor, inplace: bool = False) -> SmoothCall:
    return SmoothCall(input, Smooth(name), inplace)


def _gelu(input: Tensor, *, approximate: str = "none") -> SmoothCall:
    return SmoothCall(input, Smooth("gelu_tanh" if approximate == "tanh" else "gelu"))


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> SmoothCall | None:
    return SmoothCall(input, Smooth("elu", (float(alpha),)), inplace) if alpha > 0 else None


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> SmoothCall | None:
    return SmoothCall(input, Smooth("softplus", (float(beta), float(threshold)))) if beta > 0 else None


def _keeps(call: SmoothCall) -> Keeps:
    return Keeps.RESULT if call.kind.name in ("tanh", "sigmoid") else Keeps.INPUTS


def _compute(call: SmoothCall, handling: Handling) -> Tensor | None:
    if handling.fidelity == "exact" or not (torch.is_grad_enabled() and call.x.requires_grad):
        return None
    if call.in_place and not (may_be_overwritten(call.x) and is_dense(call.x)):
        return None
    # What is recomputed in the backward pass lives for a moment only: there is nothing to gain by rounding it.
    bits = bits_for(call.kind, handling.fidelity)[0] if torch._C._current_graph_task_id() == -1 else None
    if bits is None or not pays(call.x, call.kind):
        return None
    with labelled(call.kind.name):
        return smooth(call.x, call.kind, bits, in_place=call.in_place)


SMOOTH = CallKind(
    SmoothCall,
    readers={
        F.gelu: _gelu,
        F.silu: partial(_read, "silu"),
        torch.tanh: partial(_read, "tanh"),
        torch.Tensor.tanh: partial(_read, "tanh"),
        torch.sigmoid: partial(_read, "sigmoid"),
        torch.Tensor.sigmoid: partial(_read, "sigmoid"),
        F.hardswish: partial(_read, "hardswish"),
        F.mish: partial(_read, "mish"),
        F.elu: _elu,
        F.softplus: _softplus,
    },
    keeps=_keeps,
    handler=_compute,
    samples=aligned,
)
