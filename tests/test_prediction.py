"""The benchmark of predicted peaks: random budgets on a small model, and what it says when a promise is broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trady
from benchmarks import prediction
from benchmarks.prediction import Trial
from benchmarks.tasks import CrossEntropy, Task
from benchmarks.workloads import Workload
from tests.small_task import pixels, small_net
from trady.planning.budget import Budget, parse_budget
from trady.planning.scopes import ELEMENTS, PEAK


def task() -> Task:
    images, labels = pixels(32, 0, size=48)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return Task(small_net(), x, CrossEntropy(torch.from_numpy(labels)))


SMALL = Workload("small", "two convolutions", lambda models: task(), "trady")
TRIAL = Trial("small", "peak:1 MiB", 0, 3, 0, predicted_bytes=1000, measured_bytes=1000, budget_bytes=1000)


@pytest.mark.parametrize("optimizer", prediction.OPTIMIZERS)
def test_random_budgets_of_every_kind_are_predicted_and_kept(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prediction, "WORKLOADS", {"small": SMALL})
    target = tmp_path / "prediction.json"
    code = prediction.run(["--budgets", "6", "--draws", "2", "--optimizer", optimizer, "--json", str(target)])
    figures = json.loads(target.read_text())
    trials = figures["trials"]
    assert code == 0, trials
    scopes = [parse_budget(trial["budget"]).scope for trial in trials]
    assert scopes == [*prediction.PREDICTED, *prediction.PREDICTED, PEAK, PEAK]
    assert len({trial["budget"] for trial in trials}) == 8
    assert all(trial["channels"] > 0 for trial in trials if trial["budget_bytes"] is None)
    assert all(trial["kept"] and abs(trial["error"]) <= prediction.MOST_ERROR for trial in trials)
    shown = capsys.readouterr()
    assert "small 8/8" in shown.err
    assert shown.out.count("pass") == 2


def test_the_limits_are_the_cheapest_step_and_the_dearest() -> None:
    small = task()
    table = trady.plan(small.model, small.batch, policy="full").table
    bounds = prediction.limits(SMALL, small)
    for scope, (low, high) in bounds.items():
        assert 0 < low < high
        cheapest = prediction.attempt("small", small, Budget(scope, low), seed=0)
        assert cheapest.channels <= len(table), scope
    dearest = prediction.attempt("small", small, Budget(ELEMENTS, bounds[ELEMENTS][1]), seed=0)
    assert dearest.channels == table.channel_count


def test_a_quarter_of_the_batch_is_a_task_of_its_own() -> None:
    small = prediction.reduced(task())
    assert len(small.batch) == 8
    assert small.batch.untyped_storage().nbytes() == small.batch.nbytes
    small.run().backward()


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, [True, True]),
        ({"predicted_bytes": 1029, "budget_bytes": None}, [True, True]),
        ({"predicted_bytes": 1031}, [False, True]),
        ({"predicted_bytes": 969}, [False, True]),
        ({"budget_bytes": 999}, [True, False]),
    ],
)
def test_a_prediction_that_is_off_and_a_budget_that_is_not_kept_are_misses(
    changed: dict[str, Any], met: list[bool]
) -> None:
    assert [verdict.met for verdict in prediction.judge([TRIAL, replace(TRIAL, **changed)])] == met
