"""Depthwise convolutions on the C kernels: each function returns ``None`` or ``False`` for what they do not take.

They take float32 on the CPU, one output channel an input channel, one or two spatial dimensions. Fake tensors are
treated like those that they stand for, so that predictions allocate alike.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trady.ops.native import library, numbers, on_a_processor, unwritten

#: Most taps of a kernel, and elements of a padded plane (its copy should stay in the processor's cache).
_MOST_TAPS, _MOST_ELEMENTS = 256, 1 << 18

#: Positions of the output from which on the C kernels beat PyTorch's; small planes are faster many at a time.
_POSITIONS = 256

#: Planes times taps times stride up to which they beat it too: PyTorch's take some 50 us before they compute anything.
_LITTLE = 12_000

Sides = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def geometry(
    inputs: Sides, weight: Sides, stride: Sides, padding: Sides, dilation: Sides, pad: Sides
) -> tuple[int, ...] | None:
    """Geometry of a depthwise convolution as the C kernels read it.

    Args:
        inputs: Shape of the input, [N, C, *spatial] with 1 or 2 spatial dimensions.
        weight: Shape of the weight, [C, 1, *kernel].
        stride: One a spatial dimension, as are ``padding`` and ``dilation``.
        padding: Zeros on both sides.
        dilation: Distance of the taps.
        pad: Further zeros, in the order of ``torch.nn.functional.pad``; empty for none.

    Returns:
        Samples, channels, then height and width of input, output, kernel, stride, padding in front and
        dilation; ``None`` where the kernels do not fit.

    """
    dimensions = len(stride)
    if dimensions > 2 or len(inputs) != dimensions + 2 or min(inputs) < 1 or min(*stride, *dilation) < 1:
        return None
    sizes, kernel = inputs[2:], weight[2:]
    before = tuple(padding[i] + (pad[::2][-1 - i] if pad else 0) for i in range(dimensions))
    after = tuple(padding[i] + (pad[1::2][-1 - i] if pad else 0) for i in range(dimensions))
    if len(pad) not in (0, 2 * dimensions) or min(*before, *after, *pad, 0) < 0:
        return None
    outputs, elements, taps = [], 1, 1
    for n, b, a, k, s, d in zip(sizes, before, after, kernel, stride, dilation, strict=True):
        if n + b + a < d * (k - 1) + 1:
            return None
        outputs.append((n + b + a - d * (k - 1) - 1) // s + 1)
        elements *= n + b + a + s
        taps *= k
    if taps > _MOST_TAPS or elements > _MOST_ELEMENTS:
        return None
    if dimensions == 2:
        return (*inputs, *outputs, *kernel, *stride, *before, *dilation)
    lines = (1, *sizes, 1, *outputs, 1, *kernel, 1, *stride, 0, *before, 1, *dilation)
    return (*inputs[:2], *lines)


def _is_little(sides: tuple[int, ...]) -> bool:
    samples, channels, height, width, across, down = *sides[:2], *sides[6:10]
    return samples * channels * height * width * max(across, down) <= _LITTLE


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, sides: tuple[int, ...]) -> Tensor | None:
    """Convolve ``x`` [N, C, *spatial] with ``weight`` [C, 1, *kernel]."""
    few = sides[4] * sides[5] < _POSITIONS * sides[8] * sides[9]  # splitting rows by stride costs time
    if few and not _is_little(sides):
        return None
    kernels = _kernels(x, weight, *(() if bias is None else (bias,)))
    if kernels is None:
        return None
    out = unwritten(x.new_empty((*x.shape[:2], *sides[4:6][4 - x.dim() :])))
    offset = None if bias is None else bias.data_ptr()
    if x.is_meta or kernels.trady_depthwise(x.data_ptr(), weight.data_ptr(), offset, out.data_ptr(), numbers(*sides)):
        return out
    return None


def input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, sides: tuple[int, ...]) -> Tensor | None:
    """Gradient of the input, of this shape."""
    if sides[4] * sides[5] < _POSITIONS and not _is_little(sides):
        return None
    kernels = _kernels(gradient, weight)
    if kernels is None:
        return None
    out = unwritten(gradient.new_empty(shape))
    if gradient.is_meta or kernels.trady_depthwise_input(
        gradient.data_ptr(), weight.data_ptr(), out.data_ptr(), numbers(*sides)
    ):
        return out
    return None


def add_weight_gradient(
    gradient: Tensor, inputs: Tensor, channels: Tensor, out: Tensor, sides: tuple[int, ...]
) -> bool:
    """Add the gradient of the weights of these channels to ``out`` [n, 1, *kernel]; tell whether it was done.

    Args:
        gradient: [N, C, *spatial of the output].
        inputs: [N, n, *spatial], the channels alone.
        channels: int64 [n].
        out: Added to.
        sides: Geometry of the full convolution.

    """
    kernels = _kernels(gradient, inputs, out)
    if kernels is None or not channels.is_contiguous():
        return False
    return gradient.is_meta or bool(
        kernels.trady_depthwise_weight(
            inputs.data_ptr(),
            gradient.data_ptr(),
            channels.data_ptr(),
            len(channels),
            out.data_ptr(),
            numbers(*sides),
        )
    )


def _kernels(*tensors: Tensor) -> Any:
    """The C kernels, if they take these tensors."""
    same = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return library() if same and on_a_processor(*tensors) else None
