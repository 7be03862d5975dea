"""Folders of cells: who may work in them, and what a killed worker has left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from tests.comparisons import SHORT, run_here, write_matrix
from trady.compare.cell_folder import CELL_LOCK, CellFolder, Status
from trady.compare.cells import Job, make_jobs
from trady.compare.execute import Keep, Workplace, run_cell
from trady.compare.read import read_matrix
from trady.records.lock import LOCK, locked
from trady.training.checkpoint import find_checkpoint


@pytest.fixture
def job(tmp_path: Path) -> Job:
    [found] = make_jobs(read_matrix(write_matrix(tmp_path, SHORT)))
    return found


def place(out: Path, keep: Keep = "results") -> Workplace:
    return Workplace(out=out, keep=keep, threads=1)


def test_a_cell_that_is_at_work_elsewhere_is_left_alone(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trady.compare.execute.PATIENCE_SECONDS", 0.0)
    folder = place(tmp_path).cell_folder(job)
    with locked(folder.path, name=CELL_LOCK):
        assert run_cell(job, place(tmp_path)).status is Status.BUSY
    assert not folder.path.exists()
    with locked(folder.path, name=LOCK):  # somebody who trains in it without a comparison
        outcome = run_cell(job, place(tmp_path))
        assert outcome.status is Status.BUSY
        assert "in use by process" in outcome.message
    assert not folder.error.exists()
    assert run_cell(job, place(tmp_path)).status is Status.DONE
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "cell.json", "metrics.jsonl", "plan.json", "result.json"
    ]  # fmt: skip


@pytest.mark.parametrize("keep", ["results", "weights"])
def test_a_cell_whose_worker_was_killed_as_it_ended_drops_the_weights_that_it_was_not_to_keep(
    tmp_path: Path, job: Job, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    folder = place(out).cell_folder(job)
    with monkeypatch.context() as patch:
        patch.setattr(CellFolder, "drop_weights", lambda self: None)
        run_cell(job, place(out, keep))
    assert folder.run.model.exists()
    assert folder.run.best.exists() is (keep == "weights")
    (folder.path / CELL_LOCK).touch()
    (out / ".results.jsonl.tmp-elsewhere-7").touch()
    run_here(write_matrix(tmp_path, SHORT), out)
    kept = keep == "weights"
    assert folder.run.model.exists() is kept
    assert (find_checkpoint(folder.run.checkpoint) is not None) is kept
    assert (out / ".results.jsonl.tmp-elsewhere-7").exists()


def test_only_finished_cells_drop_anything(tmp_path: Path, job: Job) -> None:
    folder = place(tmp_path).cell_folder(job)
    folder.begin({}, keep="results")
    folder.run.model.touch()
    folder.clear_up()
    assert folder.run.model.exists()
    other = CellFolder(folder.path, replace(job.cell, seed=99))
    folder.run.result.touch()
    other.clear_up()
    assert folder.run.model.exists()
    folder.clear_up()
    assert not folder.run.model.exists()
