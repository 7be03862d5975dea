"""Max pooling: where each maximum was, in a byte a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.handling import Handling, labelled
from trady.calls.kind import Call, CallKind, Keeps, always
from trady.calls.kinds.sizes import by_dimension, each
from trady.calls.sample_rules import samples_first
from trady.ops.pooling import Window, max_pool


@dataclass(frozen=True)
class MaxPoolCall(Call):
    """Max pooling that returns values only."""

    window: Window


def _read(
    dimensions: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxPoolCall | None:
    kernel = each(kernel_size, dimensions)
    window = Window(
        kernel,
        each(stride, dimensions) if stride not in (None, [], ()) else kernel,
        each(padding, dimensions),
        each(dilation, dimensions),
        bool(ceil_mode),
    )
    if return_indices or input.dim() != dimensions + 2 or window.size > 256:
        return None
    return MaxPoolCall(input, window)


def _compute(call: MaxPoolCall, handling: Handling) -> Tensor:
    with labelled("max_pool"):
        return max_pool(call.x, call.window)


MAX_POOL = CallKind(
    MaxPoolCall,
    readers={
        **by_dimension(_read, F.max_pool1d, F.max_pool2d, F.max_pool3d),
        **by_dimension(_read, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    },
    keeps=lambda call: Keeps.NOTHING,
    handler=_compute,
    samples=samples_first,
    frees_result=always,
)
