"""Rates that a run takes by itself, what it is told when it learns nothing, and epochs that are added."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.small_runs import lines, run
from tests.small_task import StopAfter, small_data
from trady.errors import CheckpointError, TradyWarning, TrainingError
from trady.training.advice import Guessing
from trady.training.metrics import EpochMetrics
from trady.training.optimizers import NAMES
from trady.training.rates import usual_rate
from trady.training.schedule import make_schedule

METRICS = EpochMetrics(0, 100, 2.3, 0.1, 1.0, 1, 1, "", 2.3, 1, 1, 0.1, 10.0)


def ten_classes(count: int = 500) -> Guessing:
    return Guessing(Counter(dict.fromkeys(range(10), count // 10)))


def settings(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())["settings"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_the_command_line_has_a_rate(name: str) -> None:
    rate = usual_rate(name)
    assert rate is not None
    assert rate == pytest.approx(0.1) if name.startswith("sgd") else rate < 0.01
    full = usual_rate(name, policy="full")
    assert full is not None
    assert full < rate


def test_momentum_makes_the_rate_smaller_by_what_it_adds_up() -> None:
    assert usual_rate("sgd", 0.9) == pytest.approx(0.01)
    assert usual_rate("sgd-in-backward", 0.5) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 0.1), ({"momentum": 0.9}, 0.01), ({"optimizer": "adamw"}, usual_rate("adamw")), ({"policy": "full"}, 0.05)],
)
def test_a_run_without_a_rate_takes_that_of_its_optimizer(tmp_path: Path, options: dict[str, Any], rate: float) -> None:
    result = run(tmp_path, lr=None, epochs=1, warmup_epochs=0, **options)
    assert settings(tmp_path)["lr"] == pytest.approx(rate)
    assert 0 < result.history[-1].lr < rate


def test_an_optimizer_of_ones_own_keeps_its_own_rate(tmp_path: Path) -> None:
    def made(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.004)

    result = run(tmp_path, lr=None, epochs=2, warmup_epochs=0, optimizer=made)
    assert settings(tmp_path)["lr"] is None
    schedule = make_schedule(0.004, 2, 6, 0)
    assert [epoch.lr for epoch in result.history] == [schedule.rate(5), schedule.rate(11)]
    given = run(None, lr=0.004, epochs=2, warmup_epochs=0, optimizer="sgd")
    assert [e.train_loss for e in given.history] == [e.train_loss for e in result.history]


@pytest.mark.parametrize(
    ("accuracy", "loss", "rate", "said"),
    [
        (0.1, 5.0, 0.1, "may be too high for this model: try --lr 0.02 (lr=0.02)"),
        (0.11, 2.29, 0.1, "may be too low for this model: try --lr 0.3 (lr=0.3)"),
        (0.1, 2.31, 1.0, "The rate, 1, is high for this optimizer: leave --lr (lr=) out for its default, 0.1"),
        (0.1, 2.3, 1e-4, "The rate, 0.0001, is low for this optimizer"),
        (0.4, 3.6, 0.1, "may be too high"),  # it has learnt something, and its loss has left
    ],
)
def test_an_epoch_that_has_learnt_nothing_is_told_what_to_type(
    accuracy: float, loss: float, rate: float, said: str
) -> None:
    remark = ten_classes().remark(replace(METRICS, accuracy=accuracy, train_loss=loss), rate, 0.1, last=False)
    assert remark is not None
    assert f"accuracy {accuracy:.1%} after epoch 1, and guessing has 10.0%" in remark
    assert "guessing has 2.3" in remark
    assert said in remark


@pytest.mark.parametrize("metrics", [replace(METRICS, accuracy=0.2), replace(METRICS, accuracy=0.9, train_loss=0.2)])
def test_an_epoch_that_has_learnt_something_is_told_nothing(metrics: EpochMetrics) -> None:
    assert ten_classes().remark(metrics, 0.1, 0.1, last=True) is None


def test_few_labels_or_a_single_class_tell_nothing() -> None:
    assert ten_classes(40).remark(METRICS, 0.1, 0.1, last=True) is None
    assert Guessing(Counter({0: 400})).remark(replace(METRICS, accuracy=1.0), 0.1, 0.1, last=True) is None


def test_guessing_names_the_most_frequent_class() -> None:
    guessing = Guessing()
    guessing.see(torch.tensor([0] * 90 + [1] * 10 + [-100] * 50))
    guessing.see(torch.rand(7))  # labels of a regression
    assert guessing.accuracy == 0.9
    assert guessing.loss == pytest.approx(0.325, abs=1e-3)
    assert guessing.remark(replace(METRICS, accuracy=0.9, train_loss=0.3), 0.1, None, last=False) is not None
    assert guessing.remark(replace(METRICS, accuracy=0.99, train_loss=9.0), 0.1, None, last=False) is None


def test_a_run_of_a_few_steps_is_told_to_train_longer() -> None:
    remark = ten_classes().remark(replace(METRICS, step=7, train_loss=5.0), 0.1, 0.1, last=False)
    assert remark is not None
    assert remark.endswith("It had 7 steps: train for more epochs (--epochs, epochs=), or on more data")


def test_it_is_said_once_and_once_more_at_the_end() -> None:
    guessing = ten_classes()
    said = [guessing.remark(replace(METRICS, epoch=e), 0.1, 0.1, last=e == 3) is not None for e in range(4)]
    assert said == [True, False, False, True]


def test_a_run_at_a_rate_that_is_too_small_warns() -> None:
    with pytest.warns(TradyWarning, match=r"leave --lr \(lr=\) out for its default, 0\.1"):
        run(None, lr=1e-7, epochs=1, data=(small_data(48, 0), small_data(120, 1)))


def test_epochs_are_added_to_a_finished_run_as_a_second_cycle(tmp_path: Path) -> None:
    first = run(tmp_path, epochs=2)
    longer = run(tmp_path, epochs=4, resume=True, warmup_epochs=None)
    assert [epoch.epoch for epoch in longer.history] == [0, 1, 2, 3]
    assert longer.history[:2] == first.history
    assert settings(tmp_path) | {"epochs": 4, "steps": 24, "added_at": 2, "warmup_steps": 1} == settings(tmp_path)
    assert longer.history[2].lr > first.history[1].lr
    assert longer.history[3].lr == pytest.approx(first.history[1].lr)  # the same cosine, once more
    assert json.loads((tmp_path / "run.json").read_text())["weights"]["last"]["epoch"] == 3
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    again = run(tmp_path, epochs=4, resume=True)  # of a run that has had epochs added, nothing is trained again
    assert again.history == longer.history


def test_added_epochs_that_were_interrupted_go_on_where_they_were(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for out in (straight, cut):
        run(out, epochs=1)
    run(straight, epochs=3, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(cut, epochs=3, resume=True, progress=StopAfter(2))
    run(cut, epochs=3, resume=True)
    same = ("train_loss", "lr", "selection_hash", "accuracy")
    assert [[line[key] for key in same] for line in lines(cut)] == [
        [line[key] for key in same] for line in lines(straight)
    ]


def test_epochs_are_not_added_to_a_run_that_is_not_finished_or_is_another(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, epochs=3, progress=StopAfter(1))
    with pytest.raises(CheckpointError, match=r"has 1 of 3 epochs.*finish it with --epochs 3 --resume"):
        run(tmp_path, epochs=5, resume=True)
    run(tmp_path, epochs=3, resume=True)
    with pytest.raises(CheckpointError, match=r"lr was 0\.05, is now 0\.2"):
        run(tmp_path, epochs=5, lr=0.2, resume=True)
    with pytest.raises(CheckpointError, match="epochs was 3, is now 2"):
        run(tmp_path, epochs=2, resume=True)


def test_a_run_with_patience_ends_when_accuracy_does_not_rise_any_more(tmp_path: Path) -> None:
    result = run(tmp_path, lr=1e-9, epochs=9, patience=2)  # nothing changes, so the first epoch stays the best
    assert len(result.history) == 3
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["epochs"] == 3
    assert (described["weights"]["last"]["epoch"], described["weights"]["best"]["epoch"]) == (2, 0)
    assert run(tmp_path, lr=1e-9, epochs=9, patience=2, resume=True).history == result.history
    with pytest.raises(TrainingError, match="patience is 0"):
        run(None, patience=0)
