"""A matrix file, from its cells to its table."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trady.compare.cells import make_jobs
from trady.compare.devices import cells_at_a_time, check_share, visible_devices
from trady.compare.display import Display
from trady.compare.drive import Drive, jobs_left
from trady.compare.engine import Engine
from trady.compare.execute import Keep, Workplace
from trady.compare.matched import Metric
from trady.compare.read import read_matrix
from trady.compare.report import write_report
from trady.compare.results import collect, done_digests, write_rows
from trady.compare.rows import Row
from trady.compare.summary import Summary, summarize
from trady.errors import MatrixError
from trady.records.files import remove_temporaries
from trady.records.translated import file_errors

EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class Table:
    """The results of a matrix so far.

    Attributes:
        rows: One a cell, in the order in which they are run.
        complete: Whether every cell was reached.
        summary: Means, tests and costs.
        out: Where it is written.
    """

    rows: tuple[Row, ...]
    complete: bool
    summary: Summary
    out: Path


@file_errors()
def compare(
    matrix: str | Path,
    out: str | Path,
    *,
    engine: EngineName = "local",
    workers: int | None = None,
    threads: int | None = None,
    gpus_per_cell: float | None = None,
    max_minutes: float | None = None,
    retry_failed: bool = False,
    summary_only: bool = False,
    keep: Keep = "results",
    datasets: Mapping[str, str] | None = None,
    metric: Metric = "accuracy",
    display: Display | None = None,
) -> Table:
    """Run the cells of a matrix that are left, and write the table of all cells.

    Args:
        matrix: The matrix file.
        out: Folder of the cells and the table. Another call with the same folder resumes.
        engine: ``local`` processes, or ``ray``.
        workers: Cells at a time; one a processor by default.
        threads: Threads of torch in each worker; by default the processors are shared evenly. Another number of
            threads can change the last digits of a result.
        gpus_per_cell: Share of a GPU that a cell takes; only as many cells run at a time as fit. Without it, local
            workers are distributed evenly over the CUDA devices, and Ray's workers see those of their machine.
        max_minutes: No cell starts after this time, and running cells are stopped, to be resumed later.
        retry_failed: Run cells again that failed or were infeasible.
        summary_only: Run nothing.
        keep: ``weights`` keeps each cell's weights and checkpoint, ``results`` only what the table needs.
        datasets: Sources in place of the file's, by name.
        metric: What is compared: ``accuracy`` after the last epoch, or ``best_accuracy`` after any.
        display: Shows the progress.

    Raises:
        MatrixError: The file has mistakes, or there are too few GPUs.
        FileError: The folder cannot be written; ResourceError where the disk is full or memory ran out.
        StateError: Ray is asked for and not installed.
    """
    if workers is not None and workers < 1:
        raise MatrixError(f"workers is {workers}; it must be at least 1")
    if threads is not None and threads < 1:
        raise MatrixError(f"threads is {threads}; it must be at least 1")
    check_share(gpus_per_cell)
    read = read_matrix(matrix, datasets=datasets, check_sources=not summary_only)
    jobs = make_jobs(read)
    processors = os.cpu_count() or 1
    devices = visible_devices() if engine == "local" and not summary_only else ()
    count = workers or processors
    if gpus_per_cell is not None and engine == "local" and not summary_only:
        count = cells_at_a_time(len(devices), gpus_per_cell, workers, processors)
    place = Workplace(
        out=Path(out).absolute(),
        keep=keep,
        threads=threads or max(1, processors // count),
        imports=tuple(read.matrix.imports),
        search_path=tuple(sys.path),
        folder=Path.cwd(),
    )
    complete = True
    try:
        if not summary_only:
            remove_temporaries(place.out, alone=False)
            for job in jobs:
                place.cell_folder(job).clear_up()
            left = jobs_left(jobs, place, done_digests(place.out), retry_failed=retry_failed)
            hired = _engine(engine, place, workers, count, devices, gpus_per_cell)
            drive = Drive(place, hired, display or Display(), max_minutes)
            complete = drive.run(left, len(jobs))
    finally:
        rows = collect(jobs, place)
        write_rows(rows, place.out)
    summary = summarize(rows, metric)
    write_report(summary, place.out, f"Comparison: {Path(matrix).stem}")
    return Table(tuple(rows), complete, summary, place.out)


def _engine(
    name: EngineName,
    place: Workplace,
    workers: int | None,
    count: int,
    devices: tuple[str, ...],
    gpus_per_cell: float | None,
) -> Engine:
    if name == "ray":
        from trady.compare.on_ray import RayEngine

        return RayEngine(workers, place, gpus_per_cell=gpus_per_cell)
    from trady.compare.local import LocalEngine

    return LocalEngine(count, place, devices)
