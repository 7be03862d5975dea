"""What operations and their callers tell each other: who keeps a tensor, and what a fake tensor stands for."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

#: What a simulated forward pass computes in under autocast, which does not know fake tensors; ``None`` is without it.
simulated_autocast_dtype: ContextVar[torch.dtype | None] = ContextVar("simulated_autocast_dtype", default=None)

#: Addresses of storages that are followed at present. Each is a Python object, which counts as one more owner.
followed_storages: list[Container[int]] = []

#: A context that does nothing serves everybody.
_AS_IT_IS = nullcontext()

#: Whether autocast is on for any device: a question that costs next to nothing.
_autocast_anywhere = torch._C._is_any_autocast_enabled

T = TypeVar("T", bound=torch.Tensor)


def device_type(tensor: torch.Tensor) -> str:
    """Type of the device that a tensor is on, or that a fake tensor stands for."""
    return real_type(tensor.device)


def real_type(device: torch.device) -> str:
    """Type of a device, or of the one that the meta device stands for."""
    return simulated_device_type.get() if device.type == "meta" else device.type


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What products with this tensor are computed in under autocast; ``None`` where it is off."""
    return autocast_dtype_on(tensor.device)


def autocast_dtype_on(device: torch.device) -> torch.dtype | None:
    """What products on a device are computed in under autocast; ``None`` where it is off."""
    if device.type == "meta":
        return simulated_autocast_dtype.get()
    if not _autocast_anywhere():
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which calls with this tensor compute in the types of their arguments."""
    if tensor.is_meta:
        return simulated_autocast(None)
    if not _autocast_anywhere():
        return _AS_IT_IS
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _AS_IT_IS


@contextmanager
def simulated_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Context in which fake tensors are computed with as under autocast to ``dtype``; ``None`` is without it."""
    token = simulated_autocast_dtype.set(dtype)
    try:
        yield
    finally:
        simulated_autocast_dtype.reset(token)


def label_saved(tensor: T, kind: str) -> T:
    """Mark a tensor that is about to be saved for backward: ``channels``, ``bits`` or ``indices``."""
    tensor.trady_saved_kind = kind  # type: ignore[attr-defined]
    return tensor


def saved_kind(tensor: torch.Tensor) -> str | None:
    """What :func:`label_saved` said of this tensor; ``None`` for tensors saved by PyTorch's own operations."""
    return getattr(tensor, "trady_saved_kind", None)
