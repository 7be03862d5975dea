"""Pooling that keeps its input's shape and, for maxima, one byte an output."""

# N samples, C channels, spatial dimensions of the input and of the output. A place is the index of a maximum: local in
# its window (uint8), or in the flattened spatial dimensions of the input (int64).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trady.ops.context import label_saved
from trady.ops.layout import chunks, empty_like_batch, memory_format, unviewed
from trady.ops.native import library, numbers, on_a_processor, unwritten
from trady.ops.once import once_differentiable

_aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """Geometry of a pooling window over 1, 2 or 3 spatial dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def size(self) -> int:
        """Elements in the window."""
        size = 1
        for n in self.kernel:
            size *= n
        return size


def max_pool(x: Tensor, window: Window) -> Tensor:
    """Max pooling; backward keeps the place of each maximum inside its window, one byte an output.

    Args:
        x: [N, C, *spatial] with 1, 2 or 3 spatial dimensions; windows of at most 256 elements.
        window: Geometry of the window.

    """
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _MaxPool.apply(x, window)
        return out
    with torch.no_grad():
        made = _max_pool_natively(x, window, keep_places=False)
        return _max_pool(x, window)[0] if made is None else made[0]


def _max_pool(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Values and int64 places in the flattened spatial dimensions; a 1d pooling is a 2d one of height 1."""
    w = window
    if len(w.kernel) == 1:
        values, places = _aten.max_pool2d_with_indices(
            x.unsqueeze(2), (1, *w.kernel), (1, *w.stride), (0, *w.padding), (1, *w.dilation), w.ceil_mode
        )
        return values.squeeze(2), places.squeeze(2)
    pool = _aten.max_pool2d_with_indices if len(w.kernel) == 2 else _aten.max_pool3d_with_indices
    values, places = pool(x, w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode)
    return values, places


def _starts(window: Window, inputs: torch.Size, outputs: torch.Size, device: torch.device) -> list[Tensor]:
    """Where each output's window starts along each spatial dimension, shaped to broadcast over outputs."""
    dimensions = len(outputs)
    starts = []
    for d, count in enumerate(outputs):
        line = torch.arange(count, device=device) * window.stride[d] - window.padding[d]
        starts.append(line.view(-1, *(1,) * (dimensions - 1 - d)))
    return starts


def _places_in_window(places: Tensor, window: Window, inputs: torch.Size) -> Tensor:
    starts = _starts(window, inputs, places.shape[2:], places.device)
    rest, local, weight = places, torch.zeros((), dtype=torch.int64, device=places.device), 1
    for d in reversed(range(len(inputs))):
        along = rest % inputs[d]
        rest = torch.div(rest, inputs[d], rounding_mode="floor")
        local = local + weight * torch.div(along - starts[d], window.dilation[d], rounding_mode="floor")
        weight *= window.kernel[d]
    return local.to(torch.uint8)


def _places_in_input(local: Tensor, window: Window, inputs: torch.Size) -> Tensor:
    starts = _starts(window, inputs, local.shape[2:], local.device)
    rest, places, weight = local.long(), torch.zeros((), dtype=torch.int64, device=local.device), 1
    for d in reversed(range(len(inputs))):
        along = starts[d] + window.dilation[d] * (rest % window.kernel[d])
        rest = torch.div(rest, window.kernel[d], rounding_mode="floor")
        places = places + weight * along
        weight *= inputs[d]
    return places


def _native_geometry(shape: torch.Size, window: Window, last: bool) -> tuple[int, ...] | None:
    """Geometry as the C kernels read it; 1d pooling is 2d of height 1; ``None`` for what they do not take."""
    w, dimensions = window, len(window.kernel)
    if dimensions > 2 or len(shape) != dimensions + 2 or w.size > 256 or min(shape, default=0) < 1:
        return None
    if min(*w.kernel, *w.stride, *w.dilation) < 1 or min(w.padding) < 0:
        return None
    if any(2 * p > k for p, k in zip(w.padding, w.kernel, strict=True)):
        return None
    inputs, line = tuple(shape[2:]), (w.kernel, w.stride, w.padding, w.dilation)
    outputs = tuple(_output_size(n, k, s, p, d, w.ceil_mode) for n, k, s, p, d in zip(inputs, *line, strict=True))
    if min(outputs) < 1:
        return None
    fill = ((1,), (1,), (0,), (1,)) if dimensions == 1 else ((),) * 4
    sizes = (inputs, outputs) if dimensions == 2 else ((1, *inputs), (1, *outputs))
    sides = (n for first, rest in zip(fill, line, strict=True) for n in (*first, *rest))
    planes, channels = (shape[0], shape[1]) if last else (shape[0] * shape[1], 1)
    return (planes, channels, *sizes[0], *sizes[1], *sides)


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    if reach < 0:
        return 0
    count = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window begins inside the input or its left padding.
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _kernels(x: Tensor) -> Any:
    """The C kernels if they can pool ``x``; a fake tensor is treated like the one it stands for."""
    return library() if x.dtype in (torch.float32, torch.float64) and on_a_processor(x) else None


def _max_pool_natively(x: Tensor, window: Window, *, keep_places: bool) -> tuple[Tensor, Tensor | None] | None:
    """Values and uint8 places in their windows, both laid out as ``x``."""
    kernels, layout = _kernels(x), memory_format(x)
    if kernels is None or not x.is_contiguous(memory_format=layout):
        return None
    last = layout == torch.channels_last
    geometry = _native_geometry(x.shape, window, last)
    if geometry is None:
        return None
    shape = (*x.shape[:2], *geometry[4:6][2 - len(window.kernel) :])
    out = unwritten(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout))
    local = None
    if keep_places:
        local = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout)
    if not x.is_meta:
        pool = kernels.trady_max_pool_f32 if x.dtype == torch.float32 else kernels.trady_max_pool_f64
        pool(x.data_ptr(), out.data_ptr(), None if local is None else local.data_ptr(), numbers(*geometry))
    return out, local


def _gradient_natively(gradient: Tensor, local: Tensor, window: Window, shape: torch.Size) -> Tensor | None:
    kernels, layout = _kernels(gradient), memory_format(local)
    last = layout == torch.channels_last
    geometry = _native_geometry(shape, window, last)
    if kernels is None or geometry is None:
        return None
    gradient, local = (t.contiguous(memory_format=layout) for t in (gradient, local))
    made = unwritten(torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout))
    if not gradient.is_meta:
        single = gradient.dtype == torch.float32
        spread = kernels.trady_max_pool_gradient_f32 if single else kernels.trady_max_pool_gradient_f64
        spread(gradient.data_ptr(), local.data_ptr(), made.data_ptr(), numbers(*geometry))
    return made


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        native = _max_pool_natively(x, window, keep_places=True)
        if native is not None and native[1] is not None:
            ctx.window, ctx.shape = window, x.shape
            ctx.save_for_backward(label_saved(native[1], "indices"))
            return native[0]
        out: Tensor | None = None
        local: Tensor | None = None
        for chunk in chunks(x.shape[0], 2 * x.element_size() * x[0].numel() if x.shape[0] else 1):
            values, places = _max_pool(x[chunk], window)
            if out is None or local is None:
                out = empty_like_batch(values, x.shape[0])
                local = torch.empty((x.shape[0], *values.shape[1:]), dtype=torch.uint8, device=x.device)
            out[chunk].copy_(values)
            local[chunk].copy_(_places_in_window(places, window, x.shape[2:]))
        if out is None or local is None:
            return _max_pool(x, window)[0]
        ctx.window, ctx.shape = window, x.shape
        ctx.save_for_backward(label_saved(local, "indices"))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (local,) = ctx.saved_tensors
        native = _gradient_natively(gradient, local, ctx.window, ctx.shape)
        if native is not None:
            return native, None
        made = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        flat = made.flatten(2)
        for chunk in chunks(ctx.shape[0], 4 * 8 * local[0].numel()):
            places = _places_in_input(local[chunk], ctx.window, ctx.shape[2:]).flatten(2)
            flat[chunk].scatter_add_(2, places, gradient[chunk].flatten(2))
        return made, None


def average_pool(x: Tensor, pool: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Pooling that is linear in its input: backward needs only the input's shape.

    Args:
        x: The input.
        pool: The pooling itself.
        gradient: Maps (gradient of the output, a tensor of the input's shape that it does not read)
            to the gradient of the input.

    """
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _LinearPool.apply(x, pool, gradient)
        return out
    return pool(x)


class _LinearPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pool: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.shape, ctx.gradient = x.shape, gradient
        return unviewed(pool(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        unread = gradient.new_empty(1).expand(ctx.shape)
        return ctx.gradient(gradient, unread), None, None
