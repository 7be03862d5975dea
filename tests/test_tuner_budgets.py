"""What a budget holds: in elements, in bytes of the update, in bytes of the step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import IMAGE_NETWORKS, Grouped, Residual, normal, seeded
from tests.tight_budget import least_of
from tests.tuned import OPTIMIZERS, data, prepared
from trady.errors import BudgetError, ModelError
from trady.model.batch import Batch

NETWORKS = ["residual", "pre-activation", "grouped", "padded", "shared layer", "dense", "perceptron", "conv1d"]


def step_of(tuner: trady.Tuner, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        F.cross_entropy(tuner.model(x), torch.zeros(len(x), dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_draw_exceeds_the_budget_in_elements(name: str, seed: int) -> None:
    build, shape = IMAGE_NETWORKS[name]
    for policy in ("dynamic-random", "trady", "static-random"):
        tuner = trady.prepare(seeded(build), normal(3, *shape), budget="elements:700", policy=policy, seed=seed)
        for epoch in range(4):
            tuner.resample(epoch)
            left = 700 - tuner.cost().elements
            assert left >= 0
            pool = tuner.plan.pool
            for layer in tuner.plan.table:  # no channel that would still fit is left out
                full = len(tuner.selection.channels.get(layer.name, ())) == layer.channels
                assert layer.name not in pool or full or layer.elements > left
        tuner.finish()


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_updating_adds_stays_inside_an_update_budget(name: str, optimizer_name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    x = normal(8, *shape)
    tuner = trady.prepare(seeded(build), x, budget="update:24 KiB", policy="dynamic-random", seed=1)
    optimizer = tuner.attach(OPTIMIZERS[optimizer_name](tuner.parameters()))
    compacts = [p for n, p in tuner.named_parameters() if n.endswith(".channels")]
    for epoch in range(3):
        tuner.resample(epoch)
        ledger = tuner.ledger(step_of(tuner, optimizer, x), inference=False)
        state = sum(
            v.nbytes for p in compacts for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.dim()
        )
        added = ledger.saved_bytes_of("channels") + 2 * sum(p.nbytes for p in compacts) + state
        assert added == tuner.cost().update_bytes <= 24 * 1024
    tuner.finish()


@pytest.mark.parametrize("optimizer_name", ["SGD", "momentum", "AdamW"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_stays_inside_a_peak_budget(name: str, optimizer_name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    x = normal(16, *shape)
    generous = trady.plan(seeded(build), x, budget="peak:1 GiB", policy="full")
    assert generous.predicted_peak_bytes is not None
    least = least_peak(seeded(build), x)
    for share in (0.15, 0.6):
        for seed in (0, 1):
            model = seeded(build)
            amount = int(least + share * (generous.predicted_peak_bytes - least)) + least // 4
            tuner = trady.prepare(model, x, budget=f"peak:{amount} B", policy="dynamic-random", seed=seed)
            try:
                optimizer = tuner.attach(OPTIMIZERS[optimizer_name](tuner.parameters()))
            except BudgetError:
                assert optimizer_name != "SGD"
                tuner.finish()
                continue
            for epoch in range(2):
                tuner.resample(epoch)
                step = step_of(tuner, optimizer, x)
                for _ in range(2):  # the second has its state from the start
                    ledger = tuner.ledger(step, inference=False)
                    predicted = tuner.plan.predicted_peak_bytes
                    assert predicted is not None
                    assert ledger.peak_bytes <= amount, (share, seed, epoch)
                    assert ledger.peak_bytes <= 1.01 * predicted, (share, seed, epoch)
            tuner.finish()


def least_peak(model: nn.Module, x: Tensor) -> int:
    return least_of(lambda: trady.prepare(model, x, budget="peak:1 B", policy="dynamic-random"))


def named_bytes(message: str) -> int:
    """The amount of bytes that a refusal asks for, typed as a budget."""
    import re

    from trady.planning.budget import parse_budget

    found = re.findall(r"(?:peak|update|elements):[\d.]+(?: ?[kKMG]?i?B)?", message)
    return parse_budget(found[-1]).amount


@pytest.mark.parametrize("scope", ["elements", "update", "peak"])
def test_a_budget_below_the_least_is_refused_and_the_least_is_accepted(scope: str) -> None:
    unit = "" if scope == "elements" else " B"
    with pytest.raises(BudgetError) as refused:
        prepared(budget=f"{scope}:1{unit}")
    least = named_bytes(str(refused.value))
    assert least > 1
    tuner = prepared(budget=f"{scope}:{least}{unit}")
    assert scope == "peak" or tuner.cost().channels == 1
    tuner.finish()
    if scope != "peak":
        with pytest.raises(BudgetError):
            prepared(budget=f"{scope}:{least - 1}{unit}")


def test_an_optimizer_whose_state_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError) as refused:
        prepared(budget="update:1 B")
    least = named_bytes(str(refused.value))
    tuner = prepared(budget=f"update:{least} B")
    with pytest.raises(BudgetError):
        tuner.attach(torch.optim.AdamW(tuner.parameters()))
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    tuner.finish()


def test_a_plan_is_what_prepare_does() -> None:
    plan = trady.plan(seeded(Residual), data()[0][0], budget="peak:200 KiB", policy="dynamic-random", seed=4)
    tuner = trady.prepare(
        seeded(Residual), data()[0][0], plan=trady.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    )
    assert tuner.selection == plan.selection
    assert tuner.plan.to_json() == plan.to_json()
    tuner.finish()
    with pytest.raises(ModelError, match="other layers"):
        trady.prepare(seeded(Grouped), normal(2, 3, 17, 17), plan=plan)


def test_the_simulated_step_is_the_measured_one_to_the_byte() -> None:
    import trady.simulation.simulator as simulate
    from trady.analysis.model_analysis import analyse_model

    for build in (Residual, Grouped):
        model, x = seeded(build), normal(8, 3, 17, 17)
        model.train()
        analysis = analyse_model(model, x)
        hollow = simulate.Simulator(model, x, analysis).timeline(layers=analysis.table.names)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulate, "meta_copy", copy.deepcopy)
            patch.setattr(Batch, "packed", property(lambda batch: SimpleNamespace(unpack=lambda: batch)))
            real = simulate.Simulator(model, x, analysis).timeline(layers=analysis.table.names)
        assert hollow.intervals == real.intervals
