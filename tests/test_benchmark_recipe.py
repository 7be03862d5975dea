"""The commands that choose rates and time the start of the command line, on a task that takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipe, startup
from tests.small_task import small_net, write_npz
from trady.cli.options import OPTIMIZERS


def test_the_recipe_trains_with_every_optimizer_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "load_backbone", lambda name, folder, classes: small_net(classes))
    monkeypatch.setattr(recipe, "BUDGETS", {"toy": "update:12 KiB"})
    data, target = write_npz(tmp_path / "data.npz"), tmp_path / "recipe.json"
    arguments = ["--model", "toy", "--method", "trady", "--data", str(data), "--size", "12", "--epochs", "1"]
    assert recipe.run([*arguments, "--images", "16", "--optimizer", "all", "--json", str(target)]) == 0
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == list(recipe.OPTIMIZERS)
    assert {row["optimizer"].partition("+")[0] for row in rows} == set(OPTIMIZERS)
    assert all(row["rate"] is None and 0 < row["accuracy"] <= 1 and row["data"] == "data" for row in rows)
    assert "adamw-in-backward" in capsys.readouterr().out
    assert recipe.run([*arguments, "--images", "16", "--rates", "0.05", "1e30", "--json", str(target)]) == 0
    found = {row["rate"]: row["accuracy"] for row in json.loads(target.read_text())["rows"]}
    assert found[0.05] > 0
    assert found[1e30] == 0  # stopped


def test_starts_are_timed_and_have_to_end_as_they_should(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "startup.json"
    names = ["help", "a typo of a model"]
    assert startup.run(["--rounds", "2", "--command", *names, "--json", str(target)]) == 0
    seconds = json.loads(target.read_text())["seconds"]
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys(names, 2)
    assert "a typo of a model" in capsys.readouterr().out
    monkeypatch.setitem(startup.COMMANDS, "help", (("--help",), 7))
    with pytest.raises(RuntimeError, match="ended with 0, not 7"):
        startup.run(["--rounds", "1", "--command", "help"])
