"""What would do with a smaller budget: fewer samples a step, more that is recomputed, fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from trady.errors import TradyError
from trady.model.batch import Batch
from trady.simulation.meta_copy import meta_copy

#: From a model, a batch and a way to recompute to the minimum bytes of a training step.
MinimumBytes = Callable[[nn.Module, Batch, str], int]


def alternatives(
    model: nn.Module, batch: Batch, recompute: str, minimum_bytes: MinimumBytes, now: int
) -> dict[str, int]:
    """Simulate what would take less; nothing is allocated.

    Args:
        model: The model; only read.
        batch: The batch that was asked for.
        recompute: As it was asked for.
        minimum_bytes: Simulates the cheapest step.
        now: The minimum bytes of what was asked for.

    Returns:
        What helps, in words, and the minimum bytes with it.

    """
    found: dict[str, int] = {}

    def look(what: str, model: nn.Module, batch: Batch, mode: str) -> None:
        try:
            minimum = minimum_bytes(model, batch, mode)
        except (TradyError, RuntimeError, TypeError, ValueError):
            return  # this model cannot be so, and there is nothing to offer
        if minimum < now:
            found[what] = minimum

    for samples in _fewer(batch.samples) if batch.may_be_cut else ():
        what = f"with {samples} sample{'s' if samples > 1 else ''} a step"
        look(what, model, batch.chunk(0, samples), recompute)
    if recompute == "none":
        look('with recompute="all"', model, batch, "all")
    if all(p.dtype == torch.float32 for p in model.parameters()):
        try:
            halved = meta_copy(model).to(torch.bfloat16)
        except (RuntimeError, TypeError):
            return found
        look("in bfloat16", halved, batch.meta.to(torch.bfloat16), recompute)
    return found


def _fewer(samples: int) -> Sequence[int]:
    """Half, a quarter, one."""
    return sorted({n for n in (samples // 2, samples // 4, 1) if 0 < n < samples}, reverse=True)
