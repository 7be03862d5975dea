"""Counters of batch normalisations, which frozen norms do not move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def batch_counters(model: nn.Module) -> dict[int, Tensor]:
    """Find the buffers in which batch normalisations count batches; trady's norms are frozen and do not count."""
    counters = [m._buffers.get("num_batches_tracked") for m in model.modules()]
    return {id(t): t for t in counters if t is not None}


def is_count(function: Any, args: tuple[Any, ...], counters: Mapping[int, Tensor]) -> bool:
    """Whether a call is a batch normalisation counting a batch."""
    return function is torch.Tensor.add_ and bool(args) and id(args[0]) in counters


#: How a batch normalisation reads its counter: ``momentum=None`` divides by it.
READS_ONE = {torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.item}


def batches_counted(function: Any, counter: Tensor) -> float | int:
    """The number of batches, at least 1: what it weighs does not matter where statistics are fixed."""
    count = 1 if counter.is_meta else max(1, int(counter))
    return float(count) if function is torch.Tensor.__float__ else count
