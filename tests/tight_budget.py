"""A step in little more than the least peak budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

import trady


def peaks_in_a_tight_budget(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Tensor], Tensor],
    told: Callable[[Tensor], Tensor] | None = None,
    share: float = 1.05,
) -> tuple[int, int, int]:
    """Return a budget of this many times the least, and the measured and the predicted peak of a step in it."""
    with pytest.raises(trady.BudgetError) as refusal:
        trady.prepare(model, batch, budget="peak:1 B", policy="dynamic-random", loss=told)
    limit = int(share * refusal.value.least_amount)
    tuner = trady.prepare(model, batch, budget=f"peak:{limit} B", policy="dynamic-random", loss=told)

    def step() -> None:
        loss(model(**batch) if isinstance(batch, Mapping) else model(batch)).backward()
        for parameter in tuner.parameters():
            parameter.grad = None

    step()
    measured = tuner.ledger(step, inference=False).peak_bytes
    predicted = tuner.plan.predicted_peak_bytes
    assert predicted is not None
    tuner.finish()
    return limit, measured, predicted
