"""``python -m benchmarks.devices`` in small, and what it would say of processes that do not train the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.devices.__main__ import kill, parsed
from benchmarks.devices.alike import Row, Told, compared, run


def test_a_model_in_two_processes_holds_every_bar(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = parsed(
        ["--model", "llama-tiny", "--recompute", "all", "--optimizer", "adamw", "--accumulation", "3", "--processes",
         "2", "--steps", "12", "--json", str(file)]
    )  # fmt: skip
    assert run(options, Console(quiet=True)) == 0
    one, two = json.loads(file.read_text())["rows"]
    assert (one["processes"], one["calls"], one["averaged_bytes"]) == (1, 0, 0)
    assert (two["processes"], two["calls"]) == (2, 1)
    assert 0 < two["averaged_bytes"] < two["ddp_bytes"] / 2


def test_what_differs_is_missed() -> None:
    row, told = Row("cnn", "none", "sgd", 1), Told([1.0, 0.5], ["a"], "w", [1000], [1000], [1], 0.1)
    alone = replace(told, averaged_bytes=[0])

    def holds(**other: object) -> bool:
        return compared(row, alone, [(told, (0.1, 9)), (replace(told, **other), (0.1, 9))]).holds  # type: ignore[arg-type]

    assert holds()
    assert not holds(digest="v")
    assert not holds(selections=["b"])
    assert not holds(losses=[1.0, 0.5001])
    assert not compared(row, alone, [(replace(told, averaged_bytes=[1020]), (0.1, 9))] * 2).holds


@pytest.mark.filterwarnings("ignore:the run was started in:trady.errors.TradyWarning")
def test_a_run_goes_on_in_one_two_and_four_processes_after_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert kill(parsed(["--kills", "1", "--seed", "1", "--json", str(file)]), Console(quiet=True)) == 0
    found = json.loads(file.read_text())
    assert found["kills"] == 1
    assert found["went_on"] == {"1": 1, "2": 1, "4": 1}
    assert found["reasons"] > 0
