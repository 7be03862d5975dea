"""Zero padding, which a convolution behind it takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trady.calls.kind import Call, CallKind, Keeps, always
from trady.calls.sample_rules import samples_first


@dataclass(frozen=True)
class PadCall(Call):
    """Zero padding of the trailing (spatial) dimensions, in the order of ``F.pad``."""

    pad: tuple[int, ...]


def _read(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> PadCall | None:
    sides = tuple(int(n) for n in pad)
    zero = mode == "constant" and not value and all(n >= 0 for n in sides)
    return PadCall(input, sides) if zero and len(sides) <= 2 * (input.dim() - 2) else None


PAD = CallKind(
    PadCall,
    readers={F.pad: _read},
    keeps=lambda call: Keeps.NOTHING,
    samples=samples_first,
    frees_result=always,
)
