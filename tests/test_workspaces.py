"""What cuBLAS keeps for itself on a GPU is a line of plan and ledger."""

from __future__ import annotations

import pytest
import torch

import trady
from tests.small_task import small_net
from trady.memory.workspaces import workspace_bytes

KEPT = 300_000


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trady.memory.recorder", "trady.simulation.simulator"):
        monkeypatch.setattr(f"{module}.workspace_bytes", lambda device: KEPT)


def test_other_devices_keep_none() -> None:
    assert workspace_bytes(torch.device("cpu")) == workspace_bytes(torch.device("meta")) == 0


@pytest.mark.usefixtures("workspaces")
def test_plan_and_ledger_have_them_and_a_budget_leaves_room() -> None:
    model, batch = small_net(), torch.randn(8, 3, 32, 32)
    with pytest.raises(trady.BudgetError):
        trady.plan(model, batch, budget=f"peak:{KEPT} B")
    tuner = trady.prepare(model, batch, budget="peak:2 MiB", ranking="online")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))

    def step() -> None:
        torch.nn.functional.cross_entropy(model(batch), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    ledger = tuner.ledger(step)
    assert ledger.parts["workspaces"] == tuner.plan.predicted_parts["workspaces"] == KEPT
    assert sum(ledger.parts.values()) == ledger.peak_bytes <= 2 * 2**20
    assert tuner.plan.predicted_peak_bytes == pytest.approx(ledger.peak_bytes, rel=0.01)
    assert ledger.inference_peak_bytes is not None
    assert ledger.inference_peak_bytes > KEPT
