"""Whether a custom autograd function is running."""

from __future__ import annotations

import sys
from types import FrameType

import torch

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def in_custom_function() -> bool:
    """Whether a custom autograd function is running, which switches gradients off as ``no_grad`` does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None
