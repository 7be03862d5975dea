"""What a budget below the least possible would take: fewer samples a step, more computed anew, fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trady.errors import TradyError
from trady.model.batch import batch_size, meta_batch, part_of
from trady.simulation.meta_copy import meta_copy

#: From a model, a batch and a way to recompute to the least bytes of a training step.
LeastBytes = Callable[[nn.Module, Any, str], int]


def alternatives(model: nn.Module, example: Any, recompute: str, least_bytes: LeastBytes, now: int) -> dict[str, int]:
    """Simulate what would take less; nothing is allocated.

    Args:
        model: The model; only read.
        example: The batch that was asked for.
        recompute: As it was asked for.
        least_bytes: Simulates the cheapest step.
        now: The least bytes of what was asked for.

    Returns:
        What helps, in words, and the least bytes with it.

    """
    found: dict[str, int] = {}

    def look(what: str, model: nn.Module, batch: Any, mode: str) -> None:
        try:
            least = least_bytes(model, batch, mode)
        except (TradyError, RuntimeError, TypeError, ValueError):
            return  # this model cannot be so, and there is nothing to offer
        if least < now:
            found[what] = least

    for samples in _fewer(batch_size(example)):
        what = f"with {samples} sample{'s' if samples > 1 else ''} a step"
        look(what, model, part_of(example, 0, samples), recompute)
    if recompute == "none":
        look('with recompute="all"', model, example, "all")
    if all(p.dtype == torch.float32 for p in model.parameters()):
        try:
            halved = meta_copy(model).to(torch.bfloat16)
        except (RuntimeError, TypeError):
            return found
        look("in bfloat16", halved, tree_map(_in_bfloat16, meta_batch(example)), recompute)
    return found


def _fewer(samples: int) -> Sequence[int]:
    """Half, a quarter, one."""
    return sorted({n for n in (samples // 2, samples // 4, 1) if 0 < n < samples}, reverse=True)


def _in_bfloat16(leaf: Any) -> Any:
    return leaf.to(torch.bfloat16) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
