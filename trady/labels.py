"""Names that the operations give to what they do, so that a ledger can say who keeps what."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TypeVar

import torch

#: The operation under way in an intercepted call, e.g. ``conv2d+batch_norm+relu``; ``None`` outside.
current_operation: ContextVar[str | None] = ContextVar("current_operation", default=None)

#: Whether it is trady that asks a tensor where it is: a model is told that stand-ins are on the real device.
asking_for_ourselves: ContextVar[bool] = ContextVar("asking_for_ourselves", default=False)

#: The part of a batch that is computed anew: its first sample and how many they are; ``None`` is the whole batch.
samples_under_way: ContextVar[tuple[int, int] | None] = ContextVar("samples_under_way", default=None)

T = TypeVar("T", bound=torch.Tensor)


def label_saved(tensor: T, kind: str) -> T:
    """Mark a tensor that is about to be saved for backward: ``channels``, ``bits`` or ``indices``."""
    tensor.trady_saved_kind = kind  # type: ignore[attr-defined]
    return tensor


def saved_kind(tensor: torch.Tensor) -> str | None:
    """What :func:`label_saved` said of this tensor; ``None`` for tensors saved by PyTorch's own operations."""
    return getattr(tensor, "trady_saved_kind", None)
