"""A step in little more than the least peak budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

import trady
from trady.planning.budget import InfeasibleBudgetError


def least_of(refused: Callable[[], object]) -> int:
    """Return the minimum bytes that a refusal names.

    What smaller batches or fewer bits would take is left out of the message: that is four more steps to simulate.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trady.planning.request.alternatives", lambda *_, **__: {})
        with pytest.raises(InfeasibleBudgetError) as refusal:
            refused()
    return refusal.value.least_amount


def predicted_peak(plan: trady.Plan) -> int:
    assert plan.predicted_peak_bytes is not None
    return plan.predicted_peak_bytes


def peaks_in_a_tight_budget(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Tensor], Tensor],
    told: Callable[[Tensor], Tensor] | None = None,
    share: float = 1.05,
) -> tuple[int, int, int]:
    """Return a budget of this many times the least, and the measured and the predicted peak of a step in it."""
    options: dict[str, Any] = {"policy": "dynamic-random", "loss": told}
    limit = int(share * least_of(lambda: trady.prepare(model, batch, budget="peak:1 B", **options)))
    tuner = trady.prepare(model, batch, budget=f"peak:{limit} B", policy="dynamic-random", loss=told)

    def step() -> None:
        loss(model(**batch) if isinstance(batch, Mapping) else model(batch)).backward()
        for parameter in tuner.parameters():
            parameter.grad = None

    step()
    measured = tuner.ledger(step, inference=False).peak_bytes
    predicted = predicted_peak(tuner.plan)
    tuner.finish()
    return limit, measured, predicted
