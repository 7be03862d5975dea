"""What operations and those who run them tell each other: who keeps what, and what stands for what."""

from __future__ import annotations

from collections.abc import Container
from contextvars import ContextVar
from typing import TypeVar

import torch

#: The operation under way in an intercepted call, e.g. ``conv2d+batch_norm+relu``; ``None`` outside.
current_operation: ContextVar[str | None] = ContextVar("current_operation", default=None)

#: Whether it is trady that asks a tensor where it is: a model is told that stand-ins are on the real device.
internal_query: ContextVar[bool] = ContextVar("internal_query", default=False)

#: The part of a batch that is computed anew: its first sample and how many they are; ``None`` is the whole batch.
samples_under_way: ContextVar[tuple[int, int] | None] = ContextVar("samples_under_way", default=None)

#: Type of the device that tensors without memory stand for, while a step is simulated.
simulated_device_type: ContextVar[str] = ContextVar("simulated_device_type", default="cpu")

#: Storages that are followed at present, by address: each is a Python object, which counts as one owner more.
followed_storages: list[Container[int]] = []

T = TypeVar("T", bound=torch.Tensor)


def device_type(tensor: torch.Tensor) -> str:
    """Type of the device that a tensor is on; of one without memory, that it stands for."""
    return simulated_device_type.get() if tensor.is_meta else tensor.device.type


def label_saved(tensor: T, kind: str) -> T:
    """Mark a tensor that is about to be saved for backward: ``channels``, ``bits`` or ``indices``."""
    tensor.trady_saved_kind = kind  # type: ignore[attr-defined]
    return tensor


def saved_kind(tensor: torch.Tensor) -> str | None:
    """What :func:`label_saved` said of this tensor; ``None`` for tensors saved by PyTorch's own operations."""
    return getattr(tensor, "trady_saved_kind", None)
