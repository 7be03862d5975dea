"""``benchmarks.reliability`` in small: nothing is lost, different or left over; what it counts would be noticed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

pytest.importorskip("resource")

from benchmarks.reliability import trials as module
from benchmarks.reliability.report import page
from benchmarks.reliability.task import SETUPS, Run
from benchmarks.reliability.trials import Ending, Tally, Trials


def test_a_few_of_each_kind_end_well(tmp_path: Path) -> None:
    """In a process of its own: the ones that it forks must not inherit threads of the tests."""
    command = [sys.executable, "-m", "benchmarks.reliability", "--kills", "8", "--terms", "4", "--hangups", "1",
               "--pairs", "2", "--disks", "3", "--json", str(tmp_path / "figures.json")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    kinds = json.loads((tmp_path / "figures.json").read_text())["trials"]
    assert [kind["trials"] for kind in kinds] == [2, 3, 1, 4, 8]
    assert all(kind["lost"] + kind["different"] + kind["orphans"] + kind["mistakes"] == 0 for kind in kinds)
    assert sum(kind["ended"] for kind in kinds) >= 5
    assert sum(kind["within"] for kind in kinds) >= 1


def ended(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in {"metrics.jsonl": '{"epoch": 0, "seconds": 1.0}\n', **files}.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, ""),
        ({"metrics.jsonl": '{"epoch": 0, "seconds": 2.0}\n'}, ""),
        ({"metrics.jsonl": '{"epoch": 1, "seconds": 1.0}\n'}, "different"),
        ({".plan.json.tmp-here-1": ""}, "orphans"),
    ],
)
def test_what_a_run_leaves_otherwise_is_counted(tmp_path: Path, change: dict[str, str], wrong: str) -> None:
    trials = Trials(tmp_path, random.Random(0))
    setup = next(iter(SETUPS))
    trials._whole[setup] = Ending.of(ended(tmp_path / "whole")), 1.0
    tally = Tally("a kind")
    trials._check_end(Run(ended(tmp_path / "run", **change), tmp_path / "journal", setup), tally)
    assert tally.bad == bool(wrong)
    assert not wrong or getattr(tally, wrong) == 1


def test_a_lost_checkpoint_and_a_wrong_exit_are_counted(tmp_path: Path) -> None:
    trials, tally = Trials(tmp_path, random.Random(0)), Tally("a kind")
    run = Run(ended(tmp_path / "run"), tmp_path / "journal", next(iter(SETUPS)))
    run.journal.write_text("started 0\nstep 1\nsaved 1\nstep 2\n")
    trials._after(run, -signal.SIGKILL, -signal.SIGKILL, tally)
    assert (tally.lost, tally.mistakes, tally.training) == (1, 0, 1)
    trials._after(run, 70, -signal.SIGKILL, tally)
    assert tally.mistakes == 1
    trials._check_went_on(run, 5, tally)
    assert tally.lost == 3
    assert module._steps_of_last_start(run) == [1, 2]


def test_the_page_has_a_row_a_kind_and_says_what_went_wrong() -> None:
    kinds = [Tally("SIGKILL", trials=3), Tally("SIGTERM", trials=2, slowest_seconds=0.25)]
    text = page(kinds, "--kills 3", 7, 90.0, datetime(2026, 1, 2, tzinfo=timezone.utc))
    assert "| SIGKILL | 3 |" in text
    assert "0.25 s |" in text
    assert "Measured on 2026-01-02" in text
    assert "Nothing went wrong." in text
    kinds[0].blame("lost", "a checkpoint")
    assert "Wrong: 1." in page(kinds, "--kills 3", 7, 90.0, datetime(2026, 1, 2, tzinfo=timezone.utc))
