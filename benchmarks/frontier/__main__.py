"""``python -m benchmarks.frontier``: accuracy against the memory and time of a step, for TraDy and for what people do.

Each method gets the best of three to five learning rates on held-out training data, three seeds, and every cheaper way
to run it: recomputed blocks, micro-batches of 8, 4 and 1. Every call goes on where the last one ended; what is done is
in ``results/``, a line a cell. ``--summary-only`` prints the tables and draws the pictures of what there is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import options
from benchmarks.frontier.cell import Cell, run_cell
from benchmarks.frontier.methods import METHODS, Plain
from benchmarks.frontier.results import best_rate, grid_of, points, read_rows, write_rows
from benchmarks.frontier.show import draw, lost_lines, table
from benchmarks.frontier.tasks import FORTUNES, TASKS, Folders
from benchmarks.tasks import needs
from trady.errors import TradyError

RESULTS = Path(__file__).parent / "results"

#: Methods that blocks are recomputed for: those that keep every activation.
CHECKPOINTED = ("full", "lora", "dora", "rslora", "bitfit")
MICRO_BATCHES = (0, 8, 4, 1)


def cells_of(task: str, method: str, seeds: int, rows: Sequence[Any]) -> Iterator[Cell]:
    """Yield the cells of a method that can be run now: its finals wait for the choice of the rate."""
    for rate in grid_of(rows, task, method):
        yield Cell(task, method, "tune", rate)
    if (best := best_rate(rows, task, method)) is None:
        return
    for seed in range(seeds):
        yield Cell(task, method, "final", best, seed)
    way = METHODS[method].way
    several = isinstance(way, Plain) and not way.forward_only
    for checkpointing in (False, True) if method in CHECKPOINTED else (False,):
        for micro in MICRO_BATCHES if several else (0,):
            yield Cell(task, method, "cost", micro=micro, checkpointing=checkpointing)


class Runner:
    """Runs the cells that are left, a few at a time."""

    def __init__(self, tasks: Sequence[str], methods: Sequence[str], seeds: int, folders: Folders, out: Path) -> None:
        self.tasks, self.methods, self.seeds = tasks, methods, seeds
        self.folders, self.out = folders, out
        self.rows = {task: read_rows(out, task) for task in tasks}

    def next_cell(self, running: set[str]) -> Cell | None:
        """Return a cell that is neither done nor running; ``None`` if nothing can be started now."""
        for task in self.tasks:
            for method in self.methods:
                for cell in cells_of(task, method, self.seeds, list(self.rows[task].values())):
                    if cell.digest not in self.rows[task] and cell.digest not in running:
                        return cell
        return None

    def run(self, workers: int, minutes: float, console: Console) -> bool:
        """Run until all is done or the time is over; return whether all is done."""
        until, running = time.monotonic() + 60 * minutes, dict[Future[Any], Cell]()
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            while True:
                while len(running) < workers and time.monotonic() < until:
                    cell = self.next_cell({cell.digest for cell in running.values()})
                    if cell is None:
                        break
                    running[pool.submit(run_cell, cell, self.folders)] = cell
                if not running:
                    return self.next_cell(set()) is None
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._keep(running.pop(future), future.result(), console)

    def _keep(self, cell: Cell, row: dict[str, Any], console: Console) -> None:
        self.rows[cell.task][row["digest"]] = row
        write_rows(self.out, cell.task, self.rows[cell.task])
        what = f"accuracy {row['accuracy']:.3f}" if "accuracy" in row else row.get("message", "measured")
        console.print(
            f"{cell.task} {cell.method} {cell.stage} {cell.rate or ''} seed {cell.seed}: {what}, "
            f"{row['cpu_seconds']:.0f} s",
            highlight=False,
        )


def check(tasks: Sequence[str], methods: Sequence[str], folders: Folders) -> None:
    """Refuse what cannot run before anything does.

    Raises:
        TradyError: A package or a data set is missing, or a task has too few examples.
    """
    for method in methods:
        if (needed := METHODS[method].needs) is not None:
            needs(*needed)
    for name in tasks:
        task = TASKS[name]
        if any(len(rates := METHODS[method].rates[task.kind]) < 2 for method in methods):
            raise TradyError(f"{name}: a grid of {len(rates)} rates chooses nothing; give at least two")
        train: Any = task.data(folders)[0]
        labels = {
            int(train[index][1] if task.kind == "image" else train[index]["labels"]) for index in range(len(train))
        }
        if len(labels) < 2 or len(train) < task.batch_size:
            raise TradyError(f"{name}: {len(train)} examples of {len(labels)} classes are too few to train on")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the next part, print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_models(parser)
    options.add_methods(parser, list(METHODS), list(METHODS))
    parser.add_argument(
        "--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="which tasks (default: all)"
    )
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, metavar="DIR", help=f"default: {FORTUNES}")
    parser.add_argument("--seeds", type=int, default=3, help="trainings a method (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, one thread each (default: 2)")
    parser.add_argument("--max-minutes", type=float, default=85.0, help="no cell starts later (default: 85)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--summary-only", action="store_true", help="run nothing")
    chosen = parser.parse_args(arguments)
    folders = Folders(options.models_folder(chosen.models).absolute(), chosen.fortunes)
    console, complete = options.console_for(None), True
    if not chosen.summary_only:
        check(chosen.task, chosen.method, folders)
        runner = Runner(chosen.task, chosen.method, chosen.seeds, folders, chosen.out)
        complete = runner.run(chosen.workers, chosen.max_minutes, console)
    for task in chosen.task:
        found = points(list(read_rows(chosen.out, task).values()), task)
        if not found:
            continue
        console.print(table(TASKS[task], found))
        for line in lost_lines(found):
            console.print(line, highlight=False)
        for path in draw(TASKS[task], found, chosen.out):
            console.print(f"drawn: {path}", highlight=False)
    if not complete:
        console.print("cells are left: the same command goes on")
    return 0


if __name__ == "__main__":
    options.main(run)
