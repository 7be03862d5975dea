"""Average pooling: linear in its input, of which only the shape is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.handling import Handling, labelled
from trady.calls.kind import Call, CallKind, Keeps
from trady.calls.kinds.sizes import by_dimension, each
from trady.calls.sample_rules import samples_first
from trady.ops.pooling import average_pool

_aten = torch.ops.aten


@dataclass(frozen=True)
class AveragePoolCall(Call):
    """Average pooling: linear in its input.

    Attributes:
        pool: The pooling itself.
        gradient: From the gradient of the output and a tensor of the input's shape to that of the input.
    """

    pool: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _read(
    dimensions: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> AveragePoolCall | None:
    if input.dim() != dimensions + 2:
        return None
    kernel = each(kernel_size, dimensions)
    steps = each(stride, dimensions) if stride not in (None, [], ()) else kernel
    sides = each(padding, dimensions)
    if dimensions == 1:
        pool = partial(
            F.avg_pool1d,
            kernel_size=kernel,
            stride=steps,
            padding=sides,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
        )

        def gradient_1d(g: Tensor, x: Tensor) -> Tensor:
            gradient: Tensor = _aten.avg_pool2d_backward(
                g.unsqueeze(2),
                x.unsqueeze(2),
                (1, *kernel),
                (1, *steps),
                (0, *sides),
                ceil_mode,
                count_include_pad,
                None,
            )
            return gradient.squeeze(2)

        return AveragePoolCall(input, pool, gradient_1d)
    options = (kernel, steps, sides, ceil_mode, count_include_pad, divisor_override)
    forward, backward = (
        (F.avg_pool2d, _aten.avg_pool2d_backward) if dimensions == 2 else (F.avg_pool3d, _aten.avg_pool3d_backward)
    )
    return AveragePoolCall(input, lambda x: forward(x, *options), lambda g, x: backward(g, x, *options))


def _read_adaptive(dimensions: int, input: Tensor, output_size: Any) -> AveragePoolCall | None:
    if input.dim() != dimensions + 2:
        return None
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * dimensions
    if all(n == 1 for n in wanted):  # the mean over all positions: its gradient is that of the output, spread
        places = tuple(range(2, dimensions + 2))
        return AveragePoolCall(
            input,
            lambda x: x.mean(places, keepdim=True),
            lambda g, x: (g / math.prod(x.shape[2:])).expand(x.shape),
        )
    if dimensions == 1:
        return None
    forward, backward = (
        (F.adaptive_avg_pool2d, _aten._adaptive_avg_pool2d_backward)
        if dimensions == 2
        else (F.adaptive_avg_pool3d, _aten._adaptive_avg_pool3d_backward)
    )
    return AveragePoolCall(input, lambda x: forward(x, output_size), lambda g, x: backward(g, x))


def _compute(call: AveragePoolCall, handling: Handling) -> Tensor:
    with labelled("average_pool"):
        return average_pool(call.x, call.pool, call.gradient)


AVERAGE_POOL = CallKind(
    AveragePoolCall,
    readers={
        **by_dimension(_read, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        **by_dimension(_read_adaptive, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    },
    keeps=lambda call: Keeps.NOTHING,
    handler=_compute,
    samples=samples_first,
)
