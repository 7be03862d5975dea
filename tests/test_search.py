"""The search of a scheme: what each layer gains by itself, and the best sum of it inside a budget."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import trady
from tests.command import trady_here
from tests.models import same, snapshot
from tests.small_task import small_data, small_net, write_npz
from trady.channels.table import ChannelTable, Layer
from trady.cli.app import app as cli
from trady.errors import BudgetError, CheckpointError, PolicyError, TrainingError
from trady.policies import Scheme
from trady.search import contributions
from trady.search.contributions import Analysis, Contributions, analyse, candidates, find_scheme
from trady.search.evolution import Evolution
from trady.training.run import finetune


def table_of(channels: list[int]) -> ChannelTable:
    return ChannelTable(
        tuple(Layer(f"l{i}", f"l{i}.weight", "conv2d", n, 3, 2, 5, (1, n), (), ()) for i, n in enumerate(channels))
    )


# -- evolution ---------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_evolution_finds_what_trying_everything_finds(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 5))
    numbers = st.lists(st.integers(-3, 20), min_size=2 * layers, max_size=2 * layers)
    gains = np.zeros((layers, 3))
    gains[:, 1:] = np.array(data.draw(numbers)).reshape(layers, 2)
    costs = np.zeros((layers, 3), dtype=np.int64)
    costs[:, 1:] = np.abs(np.array(data.draw(numbers)).reshape(layers, 2)) + 1
    budget = data.draw(st.integers(0, 60))
    rows = np.arange(layers)
    best = max(
        gains[rows, genome].sum()
        for genome in map(list, product(range(3), repeat=layers))
        if costs[rows, genome].sum() <= budget
    )
    found = Evolution().best(gains, costs, budget)
    assert costs[rows, found].sum() <= budget
    assert gains[rows, found].sum() == best


def test_evolution_comes_close_to_the_bound_on_a_whole_network_and_depends_on_its_seed_alone() -> None:
    rng = np.random.default_rng(0)
    gains, costs = np.zeros((50, 5)), np.zeros((50, 5), dtype=np.int64)
    gains[:, 1:] = np.sort(rng.normal(0.01, 0.02, (50, 4)), axis=1)
    costs[:, 1:] = np.sort(rng.integers(300, 20_000, (50, 4)), axis=1)
    found = Evolution(seed=1).best(gains, costs, 28_000)
    assert (found == Evolution(seed=1).best(gains, costs, 28_000)).all()
    rows = np.arange(50)
    assert costs[rows, found].sum() <= 28_000
    assert gains[rows, found].sum() >= 0.97 * knapsack(gains, costs, 28_000)


def knapsack(gains: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The exact optimum, one choice a layer."""
    best = np.zeros(budget + 1)
    for gain, cost in zip(gains, costs, strict=True):
        before = best.copy()
        for g, c in zip(gain[1:], cost[1:], strict=True):
            if c <= budget:
                best[c:] = np.maximum(best[c:], before[: budget + 1 - c] + g)
    return float(best[-1])


# -- contributions -----------------------------------------------------------------------------------------------


def test_candidates_are_the_layers_from_the_output_that_fit_by_themselves() -> None:
    table = table_of([4, 8, 100])
    analysis = Analysis(ratios=(0.25, 1.0))
    assert candidates(table, 40, analysis) == [(1, 0.25), (1, 1.0), (0, 0.25), (0, 1.0)]
    assert candidates(table, 125, analysis)[0] == (2, 0.25)
    assert candidates(table, 9999, Analysis(last=1)) == [(2, 0.25), (2, 1.0)]


def test_the_scheme_is_the_largest_sum_of_gains() -> None:
    table, analysis = table_of([4, 8, 4]), Analysis(ratios=(0.5, 1.0))
    accuracies = {"head": 0.5, "0@0.5": 0.6, "0@1": 0.62, "1@0.5": 0.7, "1@1": 0.71, "2@0.5": 0.4, "2@1": 0.3}
    scheme = find_scheme(table, 30, Contributions(accuracies), analysis, Evolution())
    assert scheme == Scheme((0, 1), (0.5, 0.5), 3)
    assert scheme.elements(table) == 30
    with pytest.raises(TrainingError, match="no layer gains"):
        find_scheme(table, 30, Contributions(dict.fromkeys(accuracies, 0.5)), analysis, Evolution())
    with pytest.raises(BudgetError, match="give at least 10"):
        find_scheme(table, 9, Contributions(accuracies), analysis, Evolution())


def setting() -> dict[str, Any]:
    model = small_net()
    table = trady.plan(model, torch.randn(2, 3, 12, 12), policy="head").table
    return {
        "model": model,
        "train": small_data(24, 0),
        "evaluation": small_data(12, 1),
        "table": table,
        "budget": 99_999,
        "analysis": Analysis(ratios=(1.0,), batch_size=8),
    }


def test_a_killed_analysis_trains_nothing_twice_and_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = setting()
    before = snapshot(whole["model"])
    unbroken = analyse(**whole)
    assert same(snapshot(whole["model"]), before)
    assert set(unbroken.accuracies) == {"head", "0@1", "1@1"}

    def stop(key: str, accuracy: float | None, done: int, count: int) -> None:
        assert count == 3
        if done == 1 and accuracy is None:
            raise KeyboardInterrupt

    file = tmp_path / "kept.json"
    with pytest.raises(KeyboardInterrupt):
        analyse(**setting(), file=file, told=stop)
    runs: list[Any] = []

    def counted(*given: Any, **options: Any) -> Any:
        runs.append(options["policy"])
        return finetune(*given, **options)

    monkeypatch.setattr(contributions, "finetune", counted)
    assert analyse(**setting(), file=file).accuracies == unbroken.accuracies
    assert len(runs) == 2
    with pytest.raises(CheckpointError, match=r"lr was 0\.1, is now 0\.2"):
        analyse(**{**setting(), "analysis": Analysis(ratios=(1.0,), batch_size=8, lr=0.2)}, file=file)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="analysis of trady search is damaged"):
        analyse(**setting(), file=file)


@pytest.mark.parametrize("options", [{"ratios": ()}, {"ratios": (0.0,)}, {"ratios": (2.0,)}, {"last": 0}])
def test_an_analysis_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        Analysis(**options)


# -- the command line --------------------------------------------------------------------------------------------


LONGER = ("--epochs", "8", "--lr", "1.0")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "trady", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_a_scheme_is_searched_and_trained_from_the_command_line(tmp_path: Path) -> None:
    data, out = str(write_npz(tmp_path / "data.npz", train=128)), tmp_path / "scheme.json"
    common = ("tests.small_task:small_net", data, "--image-size", "12", "--batch-size", "8")
    found = command(
        "search", *common, "--budget", "elements:9000", *LONGER, "--ratios", "1", "--out", str(out), "--json"
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert Scheme.load(out).to_json()["layer_indices"] == result["layer_indices"]
    assert result["elements"] <= 9000
    assert "3 of 3" in found.stderr
    budget = f"elements:{result['elements']}"
    arguments = (
        *common,
        "--policy",
        "sparse-update",
        "--budget",
        budget,
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    )
    trained = trady_here("finetune", *arguments, "--scheme", str(out))
    assert trained.returncode == 0, trained.stderr


def test_what_the_command_line_cannot_search_or_train_is_refused(tmp_path: Path) -> None:
    app = CliRunner()
    for arguments, words in (
        (("search", "m", "d", "--budget", "10 MiB"), "elements:27946"),
        (("search", "m", "d", "--budget", "elements:9", "--ratios", "half"), "type shares such as"),
        (("finetune", "m", "d", "--policy", "sparse-update", "--budget", "elements:9"), "needs a scheme"),
        (("finetune", "m", "d", "--scheme", "x.json", "--budget", "elements:9"), "--scheme is for"),
        (("plan", "m", "--policy", "sparse-update", "--scheme", "x.json", "--budget", "elements:9"), "scheme x.json:"),
    ):
        found = app.invoke(cli, arguments)
        assert found.exit_code == 2
        assert words in found.stderr
