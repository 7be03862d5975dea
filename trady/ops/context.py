"""What operations and their callers tell each other: who keeps a tensor, and what a fake tensor stands for."""

from __future__ import annotations

from collections.abc import Container
from contextvars import ContextVar
from typing import TypeVar

import torch

#: The operation under way in an intercepted call, e.g. ``conv2d+batch_norm+relu``; ``None`` outside.
current_operation: ContextVar[str | None] = ContextVar("current_operation", default=None)

#: Whether trady itself asks a tensor for its device: a model is told that fake tensors are on the real device.
internal_query: ContextVar[bool] = ContextVar("internal_query", default=False)

#: The chunk of a batch that is recomputed: its first sample and how many they are; ``None`` is the full batch.
samples_under_way: ContextVar[tuple[int, int] | None] = ContextVar("samples_under_way", default=None)

#: Type of the device that fake tensors stand for, while a step is simulated.
simulated_device_type: ContextVar[str] = ContextVar("simulated_device_type", default="cpu")

#: Addresses of storages that are followed at present. Each is a Python object, which counts as one more owner.
followed_storages: list[Container[int]] = []

T = TypeVar("T", bound=torch.Tensor)


def device_type(tensor: torch.Tensor) -> str:
    """Type of the device that a tensor is on, or that a fake tensor stands for."""
    return simulated_device_type.get() if tensor.is_meta else tensor.device.type


def label_saved(tensor: T, kind: str) -> T:
    """Mark a tensor that is about to be saved for backward: ``channels``, ``bits`` or ``indices``."""
    tensor.trady_saved_kind = kind  # type: ignore[attr-defined]
    return tensor


def saved_kind(tensor: torch.Tensor) -> str | None:
    """What :func:`label_saved` said of this tensor; ``None`` for tensors saved by PyTorch's own operations."""
    return getattr(tensor, "trady_saved_kind", None)
