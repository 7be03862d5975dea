"""A loader that reads ahead holds one more batch, which the plan counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trady
from tests.models import seeded
from trady.errors import BudgetError
from trady.memory.live import LiveBytes

#: Of a batch of 64 samples of 3072 numbers, and of its labels.
BATCH_BYTES = 64 * (3072 * 4 + 8)
BUDGET = "3 MiB"


def build() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))


#: What batches are views of: no memory of a step.
DATA = torch.randn(256, 3072), torch.arange(256) % 3


def batches() -> Any:
    return Accelerator(cpu=True).prepare_data_loader(DataLoader(TensorDataset(*DATA), 64))


def peak(**options: Any) -> tuple[int, trady.Plan]:
    """The most bytes alive in a loop over batches that Accelerate has prepared, data set aside; and the plan."""
    model, loader = build(), batches()
    tuner = trady.prepare(model, torch.randn(64, 3072), budget=BUDGET, policy="static-random", **options)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    with LiveBytes() as live:
        live.register([*model.parameters(), *tuner.parameters()])
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak - sum(t.nbytes for t in DATA), tuner.plan


def test_a_loop_over_a_loader_of_accelerate_stays_inside_a_budget_that_was_told_of_it() -> None:
    taken, plan = peak(batches_ahead=1)
    assert plan.budget is not None
    assert plan.predicted_peak_bytes is not None
    assert taken <= plan.budget.amount
    assert plan.read_ahead_bytes == 64 * 3072 * 4
    beyond, without = peak()
    assert without.read_ahead_bytes == 0
    assert without.predicted_peak_bytes is not None
    assert beyond - without.predicted_peak_bytes > 0.9 * BATCH_BYTES, "one batch more than was planned"


def test_the_plan_says_it_and_is_read_back() -> None:
    plan = trady.plan(build(), torch.randn(64, 3072), budget=BUDGET, policy="static-random", batches_ahead=1)
    assert "read ahead" in str(plan)
    assert "768.0 KiB of batches that the loader holds beside the step's" in str(plan)
    assert trady.Plan.from_json(plan.to_json()).read_ahead_bytes == plan.read_ahead_bytes
    assert "read ahead" not in str(trady.plan(build(), torch.randn(64, 3072), budget=BUDGET, policy="static-random"))


@pytest.mark.parametrize("given", [-1, 1.0, True, "1"])
def test_a_number_of_batches_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(BudgetError, match=r"batches_ahead=.*type how many batches a loader holds"):
        trady.plan(build(), torch.randn(64, 3072), budget=BUDGET, batches_ahead=given)
