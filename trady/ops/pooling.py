"""Pooling that keeps its input's shape and, for maxima, one byte an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trady.labels import label_saved
from trady.ops.layout import chunks, empty_like_batch, unviewed

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
        return _max_pool(x, window)[0]


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


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        out: Tensor | None = None
        local: Tensor | None = None
        for part in chunks(x.shape[0], 2 * x.element_size() * x[0].numel() if x.shape[0] else 1):
            values, places = _max_pool(x[part], window)
            if out is None or local is None:
                out = empty_like_batch(values, x.shape[0])
                local = torch.empty((x.shape[0], *values.shape[1:]), dtype=torch.uint8, device=x.device)
            out[part].copy_(values)
            local[part].copy_(_places_in_window(places, window, x.shape[2:]))
        if out is None or local is None:
            return _max_pool(x, window)[0]
        ctx.window, ctx.shape = window, x.shape
        ctx.save_for_backward(label_saved(local, "indices"))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (local,) = ctx.saved_tensors
        made = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        flat = made.flatten(2)
        for part in chunks(ctx.shape[0], 4 * 8 * local[0].numel()):
            places = _places_in_input(local[part], ctx.window, ctx.shape[2:]).flatten(2)
            flat[part].scatter_add_(2, places, gradient[part].flatten(2))
        return made, None


def average_pool(x: Tensor, pool: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Pooling that is linear in its input: backward needs the input's shape alone.

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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        unread = gradient.new_empty(1).expand(ctx.shape)
        return ctx.gradient(gradient, unread), None, None
