"""A run of several processes inside a peak budget, and one that goes on in another number of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import trady
from tests.distributed_training import Training
from tests.models import Residual, normal, seeded, snapshot
from tests.ranks import Raised, together
from trady.simulation.optimizer_memory import Form, OptimizerMemory

TRAINING = Training("BERT", "all", partial(torch.optim.AdamW, lr=0.01))


def _prepared() -> tuple[Any, trady.Tuner, torch.optim.Optimizer]:
    model, example = TRAINING.build()
    tuner = trady.prepare(model, example, budget=TRAINING.budget, seed=3, recompute="all", ranking="structural")
    return model, tuner, tuner.attach(TRAINING.optimizer(tuner.parameters()))


def _steps(steps: range, rank: int, processes: int, state: Any = None) -> Any:
    """Do these steps; return the state then, and the weights in the end."""
    model, tuner, optimizer = _prepared()
    if state is not None:
        tuner.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    for step in steps:
        if step % 2 == 0:
            tuner.resample(step // 2)
        TRAINING.step(step, rank, processes, model, tuner, optimizer)
    state = tuner.state_dict(), optimizer.state_dict()
    return state, snapshot(tuner.finish())


def first_half(rank: int, processes: int) -> Any:
    return _steps(range(3), rank, processes)[0]


def second_half(rank: int, processes: int, file: str) -> Any:
    return _steps(range(3, 6), rank, processes, torch.load(file, weights_only=False))[1]


def peak(rank: int, processes: int, budget: str) -> tuple[int, int, int]:
    """A step's measured peak beside the predicted one, and what it has averaged."""
    model, x = seeded(Residual), normal(2, 3, 9, 9, seed=rank)
    tuner = trady.prepare(model, x, budget=budget, policy="static-random", seed=3)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    ledger = tuner.ledger(step, inference=False)
    predicted = tuner.plan.predicted_peak_bytes
    tuner.finish()
    assert predicted is not None
    return ledger.peak_bytes, predicted, ledger.averaged_bytes


def _all_peaks(rank: int, processes: int) -> list[tuple[int, int, int]]:
    return [peak(rank, processes, f"{kilobytes} KiB") for kilobytes in range(110, 200, 15)]


def test_a_run_of_two_processes_goes_on_in_one_and_in_four(tmp_path: Path) -> None:
    for name in ("two", "four"):
        (tmp_path / name).mkdir()
    first, second = together({"first": first_half}, tmp_path / "two")["first"]
    assert not isinstance(first, Raised), first
    assert first[0]["meta"] == second[0]["meta"]
    torch.save(first, tmp_path / "state.pt")
    going_on = partial(second_half, file=str(tmp_path / "state.pt"))
    four = together({"second": going_on}, tmp_path / "four", 4)["second"]
    unbroken = _steps(range(6), 0, 1)[1]
    for weights in (going_on(0, 1), *four):
        assert not isinstance(weights, Raised), weights
        for key, value in unbroken.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-8, atol=1e-10)


def test_a_peak_budget_holds_with_the_buffers(tmp_path: Path) -> None:
    for told in together({"peaks": _all_peaks}, tmp_path)["peaks"]:
        assert not isinstance(told, Raised), told
        for budget, (measured, predicted, averaged) in zip(range(110, 200, 15), told, strict=True):
            assert averaged > 0
            assert measured <= budget << 10
            assert measured <= predicted * 1.03


def test_the_buffers_count_where_an_optimizer_needs_less() -> None:
    forms = [Form.of((100, 50), 4), Form.of((40, 30), 4)]
    alone, several = OptimizerMemory(copies=1), OptimizerMemory(copies=1, averages=True)
    whole = sum(form.whole for form in forms)
    assert alone.moment_bytes(forms) == 0
    assert several.moment_bytes(forms) == several.most_moment_bytes(forms) == whole + 16
    assert (alone | several).averages
    assert several.with_state(several.state()).averages
    assert OptimizerMemory(every=2, averages=True).moment_bytes(forms) == 2 * whole
    assert several.moment_bytes([Form.of((4096, 4096), 4)]) == pytest.approx(0, abs=8)
