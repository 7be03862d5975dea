"""How a tensor lies in memory: rows for the packed kernels, chunks of samples, ownership of gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from trady.ops.context import followed_storages
from trady.ops.once import once_differentiable

_unsafe_view = torch.ops.aten._unsafe_view.default

#: Temporaries of one operation stay below this many bytes where they can be made in chunks of samples.
CHUNK_BYTES = 2 << 20


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense layout that fits ``x`` best: channels_last (2d or 3d) or contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor; one that is of this type already costs a comparison."""
    return x if x.dtype is dtype else x.to(dtype)


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` fills its memory in one of the layouts of :func:`memory_format`."""
    return x.is_contiguous() or memory_format(x) is not torch.contiguous_format


def rows_of(x: Tensor) -> Tensor:
    """View a dense tensor as [samples, elements in memory order]; no copy.

    Raises:
        RuntimeError: The tensor is not dense (see :func:`is_dense`).

    """
    if memory_format(x) is not torch.contiguous_format:
        x = x.movedim(1, -1)
    return x.reshape(1, -1) if x.dim() < 2 else x.view(x.shape[0], -1) if x.numel() else x.reshape(x.shape[0], 0)


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Copy the slices ``index`` (int64) of one dimension.

    ``index_select`` first copies all of a tensor that is not contiguous, such as a channels_last one.
    """
    return x.index_select(dim, index) if x.is_contiguous() else x[(slice(None),) * (dim % x.dim()) + (index,)]


def chunks(samples: int, bytes_a_sample: int) -> Iterator[slice]:
    """Slices of samples whose temporaries stay below :data:`CHUNK_BYTES` (at least one sample each)."""
    step = max(1, CHUNK_BYTES // max(1, bytes_a_sample))
    for start in range(0, samples, step):
        yield slice(start, min(samples, start + step))


def empty_like_batch(chunk: Tensor, samples: int) -> Tensor:
    """An uninitialised batch of ``samples`` samples like those of ``chunk``, in the same layout."""
    return torch.empty(
        (samples, *chunk.shape[1:]), dtype=chunk.dtype, device=chunk.device, memory_format=memory_format(chunk)
    )


def is_owned(gradient: Tensor, references: int) -> bool:
    """Whether nobody but the caller can see this gradient, so that it may be overwritten.

    Autograd hands the same tensor to both branches of a residual addition, a hook may keep it, a
    view may share its memory. All of these hold a further reference to the tensor, its Python
    object or its storage. The counts of an unshared gradient are measured once, in a known graph.

    Args:
        gradient: As ``backward`` received it.
        references: ``sys.getrefcount(gradient)`` taken in ``backward`` itself.

    """
    alone = _references_when_alone()
    if alone is None or type(gradient) is not Tensor or gradient._base is not None:
        return False
    seen = (references, *_references(gradient))
    return all(now <= then for now, then in zip(seen, alone, strict=True)) and is_dense(gradient)


def _references(tensor: Tensor) -> tuple[int, int]:
    # Not through untyped_storage(): once a storage has been a Python object it counts as one more owner for good,
    # and autograd then copies where it would add to this gradient in place.
    address = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
    followed = any(address in storages for storages in followed_storages)
    return tensor._use_count(), torch._C._storage_Use_Count(address) - followed  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    seen: ClassVar[list[tuple[int, int, int]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Probe.seen.append((sys.getrefcount(gradient), *_references(gradient)))
        return gradient + 1


@cache
def _references_when_alone() -> tuple[int, int, int] | None:
    """Count the references to a gradient that is not shared; ``None`` where sharing does not show."""
    # Modes that are active now may hold storages, which would spoil what is taken for normal.
    with torch.enable_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        try:
            _Probe.seen = []
            x = torch.zeros(2, requires_grad=True)
            _Probe.apply(_Probe.apply(x)).mul(2).sum().backward()
            alone = _Probe.seen[:]
            _Probe.seen = []
            y = x * 1
            (_Probe.apply(y) + _Probe.apply(y)).mul(2).sum().backward()
            shared = _Probe.seen[0]
            kept: list[Tensor] = []
            _Probe.seen = []
            y = _Probe.apply(x)
            y.register_hook(kept.append)
            y.mul(2).sum().backward()
            hooked = _Probe.seen[0]
        except (AttributeError, RuntimeError):
            return None
    certain = alone[0] == alone[1] and shared[1] > alone[0][1] and hooked[0] > alone[0][0]
    return alone[0] if certain else None


def count_write(x: Tensor) -> None:
    """Tell autograd's version counter of a write that PyTorch did not see."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def unviewed(x: Tensor) -> Tensor:
    """The same memory as a tensor of its own.

    An autograd function must not return a view, or the model could not write into it (``out += x``).
    """
    return _unsafe_view(x, x.shape) if x._is_view() else x
