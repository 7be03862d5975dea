"""The precision of forward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["no", "bf16"]


def compute_dtype(precision: str) -> torch.dtype | None:
    """Return what forward passes compute in under autocast; ``None`` is without it."""
    return None if precision == "no" else torch.bfloat16


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: autocast to bfloat16, or nothing."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
