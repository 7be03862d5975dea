"""The page of a run says what the run folder says; the page of several holds them against each other."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.small_runs import lines, run
from trady.cli.app import app
from trady.errors import CheckpointError, DataError, TrainingError
from trady.outcome import figures
from trady.outcome.finished_run import read_run
from trady.outcome.run_page import PAGE, verdict, write_page
from trady.report.units import format_bytes, format_count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    run(out, budget="peak:1 MiB", epochs=2)
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("more") / "one"
    run(out, policy="full", budget=None, epochs=1)
    return out


def text_of(path: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", path.read_text(), flags=re.S)))


def test_the_page_says_what_the_files_say(folder: Path) -> None:
    page = write_page([folder])
    assert page == folder / PAGE
    text, plan = text_of(page), json.loads((folder / "plan.json").read_text())
    for epoch in lines(folder):
        assert f"{epoch['accuracy']:.2%}" in text
        assert f"{epoch['evaluation_loss']:.4f}" in text
        assert format_bytes(epoch["peak_bytes"]) in text
    assert "peak 1.0 MiB" in text
    assert format_bytes(plan["predicted_phases"]["evaluation"]) in text
    assert format_count(plan["head_parameters"]) in text
    for name, channels in plan["selection"].items():
        assert name in text
        assert len(channels) > 0
    assert json.loads((folder / "run.json").read_text())["versions"]["torch"] in text
    assert page.read_text().count("<svg") == 3


def test_a_second_page_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    pages = [write_page([folder], tmp_path / name) for name in ("a.html", "b.html")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_the_page_of_full_fine_tuning_has_no_plan(full: Path) -> None:
    text = text_of(write_page([full]))
    assert "Where it was learned" not in text
    assert "no limit" in text


def test_several_runs_are_held_against_each_other(folder: Path, full: Path, tmp_path: Path) -> None:
    page = write_page([folder, full], tmp_path / "all.html")
    text, runs = text_of(page), [read_run(path) for path in (folder, full)]
    best = max(runs, key=lambda each: each.last.quality)
    assert f"is {best.path}, with {best.last.accuracy:.1%}" in text  # both folders are called one
    assert all(verdict(each) in text for each in runs)
    assert "says nothing of chance" in text


def test_a_run_that_is_not_finished_says_so(folder: Path, tmp_path: Path) -> None:
    for name in ("run.json", "plan.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="no epoch of this run is done"):
        write_page([tmp_path])
    (tmp_path / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    assert "1 epoch of 2: the run is not finished" in text_of(write_page([tmp_path]))


def test_what_cannot_be_is_refused(folder: Path, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="--out"):
        write_page([folder, full])
    with pytest.raises(CheckpointError, match="does not exist"):
        write_page([tmp_path / "none"])
    monkeypatch.setattr(figures, "_DRAWS_WITH", "no_such_package")
    with pytest.raises(TrainingError, match=r"trady\[plots\]"):
        write_page([folder])


def test_the_command_writes_it(folder: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "page.html")])
    assert told.exit_code == 0, told.output
    assert str(tmp_path / "page.html") in told.output.replace("\n", "")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
