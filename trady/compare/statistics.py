"""Means, paired t-tests and effect sizes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trady.compare.matched import Scores, Task, pairs

#: Level of significance, and one minus the coverage of intervals.
LEVEL = 0.05


@dataclass(frozen=True)
class Mean:
    """A policy's accuracy at one budget, or over all.

    Attributes:
        policy: Its name.
        budget: Its name; ``None`` is all of them.
        mean: Over the tasks, each being the mean over its seeds. ``None`` where no cell is done.
        spread: Standard deviation between the seeds of a task, pooled over the tasks; ``None`` with one seed.
        cells: How many are done.
        expected: How many there will be.
    """

    policy: str
    budget: str | None
    mean: float | None
    spread: float | None
    cells: int
    expected: int


@dataclass(frozen=True)
class Paired:
    """Two policies over matched cells: two-sided paired t-test.

    Attributes:
        first: The one whose lead is positive.
        second: The other.
        budget: Its name; ``None`` is all of them.
        pairs: Matched cells.
        difference: Mean of first − second.
        low: Lower end of its 95 % interval; ``None`` with fewer than two pairs.
        high: Upper end.
        effect: Cohen's d_z, the mean over the standard deviation of the differences; ``None`` where that is zero.
        p: Of no difference.
        adjusted: ``p`` after Benjamini and Hochberg (1995), over all pairs of policies of the same budget.
    """

    first: str
    second: str
    budget: str | None
    pairs: int
    difference: float
    low: float | None = None
    high: float | None = None
    effect: float | None = None
    p: float | None = None
    adjusted: float | None = None


@dataclass(frozen=True)
class Wins:
    """On how many tasks (model, data set and budget) a policy beats another.

    Attributes:
        row: The one that wins.
        column: The one that loses.
        tasks: On how many both have results.
        in_mean: On how many its mean over the seeds is higher.
        significant: On how many the lead is significant by a paired t-test over the seeds.
    """

    row: str
    column: str
    tasks: int
    in_mean: int
    significant: int


def mean_accuracy(scores: Scores, budget: str | None, expected: int) -> Mean:
    """Average over tasks, each by its seeds."""
    tasks = [seeds for task, seeds in scores.by_task.items() if budget is None or task.budget == budget]
    if not tasks:
        return Mean(scores.policy, budget, None, None, 0, expected)
    spreads = [statistics.variance(seeds.values()) for seeds in tasks if len(seeds) > 1]
    return Mean(
        policy=scores.policy,
        budget=budget,
        mean=statistics.fmean(statistics.fmean(seeds.values()) for seeds in tasks),
        spread=math.sqrt(statistics.fmean(spreads)) if spreads else None,
        cells=sum(len(seeds) for seeds in tasks),
        expected=expected,
    )


def compare_pair(first: Scores, second: Scores, budget: str | None) -> Paired | None:
    """Test two policies over the cells that both have; ``None`` where there is no such cell."""
    matched = _of_budget(pairs(first, second), budget)
    differences = [a - b for values in matched.values() for a, b in values]
    if not differences:
        return None
    difference = statistics.fmean(differences)
    plain = Paired(first.policy, second.policy, budget, len(differences), difference)
    spread = _spread(differences)
    if spread is None:
        return plain
    if spread == 0:
        return replace(plain, low=difference, high=difference, p=1.0 if difference == 0 else None)
    from scipy.stats import t

    freedom, error = len(differences) - 1, spread / math.sqrt(len(differences))
    half = float(t.ppf(1 - LEVEL / 2, freedom)) * error
    return replace(
        plain,
        low=difference - half,
        high=difference + half,
        effect=difference / spread,
        p=2 * float(t.sf(abs(difference) / error, freedom)),
    )


def adjust(tests: Sequence[Paired]) -> list[Paired]:
    """Give the tests of one family their adjusted p-values."""
    from scipy.stats import false_discovery_control

    known = [test.p for test in tests if test.p is not None]
    adjusted = iter(false_discovery_control(known).tolist() if known else ())
    return [test if test.p is None else replace(test, adjusted=next(adjusted)) for test in tests]


def count_wins(row: Scores, column: Scores) -> Wins:
    """Count the tasks on which one policy beats another."""
    matched = pairs(row, column)
    leads = {task: statistics.fmean(a - b for a, b in values) for task, values in matched.items()}
    significant = [task for task, lead in leads.items() if lead > 0 and _is_significant(matched[task])]
    return Wins(row.policy, column.policy, len(matched), sum(lead > 0 for lead in leads.values()), len(significant))


def _of_budget(
    matched: dict[Task, list[tuple[float, float]]], budget: str | None
) -> dict[Task, list[tuple[float, float]]]:
    return {task: values for task, values in matched.items() if budget is None or task.budget in (budget, "")}


def _is_significant(values: Sequence[tuple[float, float]]) -> bool:
    differences = [a - b for a, b in values]
    spread = _spread(differences)
    if spread is None:
        return False
    if spread == 0:
        return differences[0] != 0
    from scipy.stats import t

    statistic = statistics.fmean(differences) / (spread / math.sqrt(len(differences)))
    return bool(2 * t.sf(abs(statistic), len(differences) - 1) < LEVEL)


def _spread(differences: Sequence[float]) -> float | None:
    """Return the standard deviation; zero where the differences differ by rounding alone."""
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    return 0.0 if spread < 1e-12 else spread
