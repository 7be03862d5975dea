"""``trady study`` as a person types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.command import MODEL, trady_command, trady_here
from tests.small_task import write_npz
from trady.cli.app import app
from trady.cli.commands.study import short_names
from trady.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(write_npz(folder / "first.npz"), folder / "second.npz")
    return folder


def study(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("study", MODEL, data / "first.npz", data / "second.npz", "--image-size", 12, "--batch-size", 8,
            "--epochs", 1, "--seeds", 2, "--noise-batches", 2, "--out", out, *more)  # fmt: skip


def test_a_study_shows_its_runs_and_figures_are_drawn_again_from_the_records_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shown = trady_command(*study(data, out, "--json"))
    assert shown.returncode == 0, shown.stderr
    assert "[4/4] second, seed 1: epoch 1/1" in shown.stderr
    found = json.loads(shown.stdout)
    assert [(run["dataset"], run["seed"]) for run in found["runs"]] == [
        ("first", 0), ("first", 1), ("second", 0), ("second", 1)
    ]  # fmt: skip
    assert str(tmp_path) not in shown.stdout
    page = (out / "index.html").read_text()
    whole = (out / "study.json").read_text()
    shutil.rmtree(out / "figures")
    (out / "index.html").unlink()
    again = trady_here("study", "--figures-only", out)
    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stderr
    assert (out / "index.html").read_text() == page
    assert (out / "study.json").read_text() == whole
    assert len([*(out / "figures").iterdir()]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("study",), "no model is given"),
        (("study", MODEL), "no data set is given"),
        (("study", MODEL, "fashion-mnist", "--budget", "much"), "much"),
        (("study", MODEL, "fashion-mnist", "--budget", "elements:900", "--policy", "full"), "leave --budget out"),
        (("study", MODEL, "fashion-mnist", "--simulate", "300 MiB"), "simulated in elements"),
        (("study", "--figures-only", "nowhere"), "there is no study in nowhere"),
        (("study", MODEL, "--figures-only", "runs"), "type the study's folder and no model"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: tuple[str, ...], message: str) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2
    assert message in shown.stderr


def test_packages_that_are_missing_are_named_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.study.extra.PACKAGES", ("scipy", "not_a_package"))
    shown = CliRunner().invoke(app, ["study", MODEL, "fashion-mnist"])
    assert shown.exit_code == 2
    assert 'a study needs not_a_package: pip install "trady[study]"' in shown.stderr


def test_data_sets_of_the_same_name_are_refused() -> None:
    assert short_names(["fashion-mnist", "a/b.npz", "photos/"]) == ["fashion-mnist", "b", "photos"]
    with pytest.raises(DataError, match="several data sets are called b"):
        short_names(["a/b.npz", "c/b.npz"])
