"""Dropout: its mask in one bit an element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.handling import Handling, labelled
from trady.calls.kind import Call, CallKind, Keeps
from trady.calls.sample_rules import aligned
from trady.ops.dropout import dropout


@dataclass(frozen=True)
class DropoutCall(Call):
    """Dropout in training mode with 0 < probability < 1."""

    probability: float


def _read(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> DropoutCall | None:
    return DropoutCall(input, p) if training and not inplace and 0 < p < 1 else None


def _read_torch(input: Tensor, p: float, train: bool) -> DropoutCall | None:
    return _read(input, p, train)


def _compute(call: DropoutCall, handling: Handling) -> Tensor:
    with labelled("dropout"):
        return dropout(call.x, call.probability)


DROPOUT = CallKind(
    DropoutCall,
    readers={F.dropout: _read, torch.dropout: _read_torch},
    keeps=lambda call: Keeps.NOTHING,
    handler=_compute,
    samples=aligned,
)
