"""The rows of the cells, and what they say: means, the frontier of TraDy, and who lies above it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.frontier.methods import METHODS, Method, Tuned
from benchmarks.frontier.tasks import TASKS
from trady.records.files import write_lines

Row = Mapping[str, Any]

#: A grid of rates grows up to so many where the best is at its edge.
MOST_RATES = 5

#: Peaks are compared up to this multiple of that of inference; above it, memory is no argument.
UP_TO = 2.0


def file_of(folder: Path, task: str) -> Path:
    """Return where the rows of a task are."""
    return folder / f"{task}.jsonl"


def read_rows(folder: Path, task: str) -> dict[str, Row]:
    """Return the finished cells of a task by digest; none where there is no file yet."""
    try:
        lines = file_of(folder, task).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return {row["digest"]: row for row in map(json.loads, lines)}


def write_rows(folder: Path, task: str, rows: Mapping[str, Row]) -> None:
    """Write the finished cells of a task; the file is replaced completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(file_of(folder, task), (json.dumps(row) for row in rows.values()))


@dataclass(frozen=True)
class Point:
    """One method on one task.

    Attributes:
        method: The method.
        rate: The learning rate that was best on held-out training data.
        at_edge: Whether it is the lowest or highest of the grid.
        accuracies: After the last epoch, one a seed.
        costs: Peak and time of a step, one a way of running it; empty where it is not measured yet.
        trainable: Elements that train.
    """

    method: Method
    rate: float
    at_edge: bool
    accuracies: Mapping[int, float]
    costs: tuple[Row, ...]
    trainable: int

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return fmean(self.accuracies.values())

    @property
    def deviation(self) -> float:
        """Standard deviation between the seeds; 0 with one."""
        return stdev(self.accuracies.values()) if len(self.accuracies) > 1 else 0.0

    @property
    def ours(self) -> bool:
        """Whether it is TraDy: its own policies, not the engine with another rule."""
        return isinstance(self.method.way, Tuned) and self.method.way.policy in ("trady", "trady+")

    @property
    def cheapest(self) -> Row | None:
        """The way of running it that has the lowest peak."""
        return min(self.costs, key=lambda cost: cost["peak_bytes"], default=None)

    @property
    def usual(self) -> Row | None:
        """The whole batch at once, nothing recomputed."""
        return next((cost for cost in self.costs if not cost["micro"] and not cost["checkpointing"]), None)


def grid_of(rows: Iterable[Row], task: str, method: str) -> list[float]:
    """Return the rates that are tried: those of the method, and more beyond an edge that turned out to be the best."""
    tried = {row["rate"]: row for row in rows if row["method"] == method and row["stage"] == "tune"}
    grid = sorted(METHODS[method].rates[TASKS[task].kind])
    while len(grid) < MOST_RATES and all(rate in tried for rate in grid):
        best = _best(tried, grid)
        if best == grid[0]:
            grid.insert(0, float(f"{grid[0] ** 2 / grid[1]:.1g}"))
        elif best == grid[-1]:
            grid.append(float(f"{grid[-1] ** 2 / grid[-2]:.1g}"))
        else:
            break
    return grid


def best_rate(rows: Iterable[Row], task: str, method: str) -> float | None:
    """Return the rate of the highest accuracy on held-out data; ``None`` before all of the grid is tried."""
    rows = list(rows)
    tried = {row["rate"]: row for row in rows if row["method"] == method and row["stage"] == "tune"}
    grid = grid_of(rows, task, method)
    return _best(tried, grid) if all(rate in tried for rate in grid) else None


def _best(tried: Mapping[float, Row], grid: Sequence[float]) -> float | None:
    done = {rate: tried[rate]["accuracy"] for rate in grid if tried[rate]["status"] == "done"}
    return max(done, key=lambda rate: done[rate], default=None)


def points(rows: Sequence[Row], task: str) -> list[Point]:
    """Return the methods of a task that have been trained to the end, in the order of ``METHODS``."""
    found = []
    for name, method in METHODS.items():
        mine = [row for row in rows if row["method"] == name and row["status"] == "done"]
        rate = best_rate(rows, task, name)
        finals = [row for row in mine if row["stage"] == "final" and row["rate"] == rate]
        if rate is None or not finals:
            continue
        grid = grid_of(rows, task, name)
        costs = tuple(row for row in mine if row["stage"] == "cost")
        found.append(
            Point(
                method,
                rate,
                rate in (grid[0], grid[-1]),
                {row["seed"]: row["accuracy"] for row in finals},
                costs,
                round(fmean(row["trainable"] for row in finals)),
            )
        )
    return found


@dataclass(frozen=True)
class Duel:
    """A method against the best of TraDy that needs no more memory.

    Attributes:
        theirs: The method.
        cost: The way of running it that is compared.
        ours: TraDy's best at that peak or below; ``None`` where TraDy was not measured so low.
        difference: TraDy's accuracy less the method's, paired by seed, in points.
        error: Standard error of the difference, in points; 0 with one seed.
        pairs: Seeds that both have.
    """

    theirs: Point
    cost: Row
    ours: Point | None
    difference: float = 0.0
    error: float = 0.0
    pairs: int = 0

    @property
    def lost(self) -> bool:
        """Whether the method lies above TraDy's line by more than one standard error."""
        return self.ours is not None and self.difference < -self.error


#: Peaks that differ by less are the same: a share of the larger one.
SAME_PEAK = 0.02


def duels(found: Sequence[Point]) -> list[Duel]:
    """Hold every way of running every method up to ``UP_TO`` times inference against TraDy's line."""
    mine = [point for point in found if point.ours and point.usual]
    fights = []
    for point in found:
        if point.ours:
            continue
        for cost in point.costs:
            if cost["peak_bytes"] > UP_TO * (1 + SAME_PEAK) * cost["inference_peak_bytes"]:
                continue
            fits = [p for p in mine if p.usual and p.usual["peak_bytes"] <= (1 + SAME_PEAK) * cost["peak_bytes"]]
            best = max(fits, key=lambda p: p.accuracy, default=None)
            if best is None:
                fights.append(Duel(point, cost, None))
                continue
            seeds = sorted(best.accuracies.keys() & point.accuracies.keys())
            gaps = [100 * (best.accuracies[seed] - point.accuracies[seed]) for seed in seeds]
            error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
            fights.append(Duel(point, cost, best, fmean(gaps), error, len(gaps)))
    return fights


def way_of(cost: Row) -> str:
    """Say how a step is run."""
    parts = ["checkpointing"] if cost["checkpointing"] else []
    if cost["micro"]:
        parts.append(f"micro-batch {cost['micro']}")
    return ", ".join(parts)
