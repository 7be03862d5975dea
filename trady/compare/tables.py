"""The tables of a comparison, for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from trady.compare.rows import Row
from trady.compare.statistics import Mean
from trady.compare.summary import Summary
from trady.report.page import Table
from trady.report.units import format_bytes

_NONE = "–"


def accuracy_table(summary: Summary) -> Table:
    """Accuracy by policy and budget."""
    budgets: tuple[str | None, ...] = (*summary.budgets, None) if len(summary.budgets) > 1 else (None,)
    rows = [[policy, *(_mean(summary.mean(policy, budget)) for budget in budgets)] for policy in summary.policies]
    models, datasets, seeds = (len({getattr(row, name) for row in summary.rows}) for name in _AXES)
    caption = (
        f"Top-1 accuracy in %: mean over {_count(models, 'model')} and {_count(datasets, 'data set')}, "
        f"± the standard deviation between {_count(seeds, 'seed')}."
    )
    if any(0 < mean.cells < mean.expected for mean in summary.means):
        caption += " * some of its cells are missing (done/all): compare such means by the paired tests only."
    return Table(["policy", *(budget or "all budgets" for budget in budgets)], rows, caption)


def detail_table(summary: Summary) -> Table:
    """Accuracy by model, data set and budget, a column a policy."""
    rows = []
    tasks = dict.fromkeys((row.model, row.dataset) for row in summary.rows)
    for model, dataset in tasks:
        for budget in summary.budgets:
            here = [r for r in summary.rows if (r.model, r.dataset) == (model, dataset) and r.budget in (budget, None)]
            rows.append(
                [f"{model} {dataset} {budget}".strip(), *(_of(here, policy, summary) for policy in summary.policies)]
            )
    return Table(["task", *summary.policies], rows, "Top-1 accuracy in % by task: mean over the seeds.")


def paired_table(summary: Summary, policy: str | None = None) -> Table:
    """Every pair of policies over all budgets, or those of one policy."""
    header = ["policies", "pairs", "difference", "95 % interval", "d_z", "p", "adjusted p"]
    rows = [
        [
            f"{test.first} − {test.second}",
            str(test.pairs),
            f"{100 * test.difference:+.2f}",
            _NONE if test.low is None or test.high is None else f"{100 * test.low:+.2f} … {100 * test.high:+.2f}",
            _NONE if test.effect is None else f"{test.effect:+.2f}",
            _p(test.p),
            _p(test.adjusted),
        ]
        for test in summary.tests
        if test.budget is None and policy in (None, test.first, test.second)
    ]
    caption = (
        "Two-sided paired t-tests over matched cells (same model, data set, budget and seed), differences in points "
        "of accuracy, d_z = mean / standard deviation of the differences, p adjusted for all pairs after Benjamini "
        "and Hochberg. A policy without a budget is matched with every budget, so its cells count more than once: "
        "read its p as a lower bound."
    )
    return Table(header, rows, caption)


def wins_table(summary: Summary) -> Table:
    """On how many tasks the row beats the column."""
    wins = {(found.row, found.column): found for found in summary.wins}
    rows = []
    for row in summary.policies:
        cells = [wins.get((row, column)) for column in summary.policies]
        texts = [_NONE if cell is None or not cell.tasks else f"{cell.in_mean} ({cell.significant})" for cell in cells]
        rows.append([row, *texts])
    tasks = max((found.tasks for found in summary.wins), default=0)
    caption = (
        f"On how many of {_count(tasks, 'task')} (model, data set, budget) the row's mean beats the column's, and in "
        "brackets on how many of them significantly (paired t-test over the seeds, p < 0.05)."
    )
    return Table(["policy", *summary.policies], rows, caption)


def cost_table(summary: Summary) -> Table:
    """What each policy takes."""
    header = ["policy", "budget", "step", "run", "peak", "saved", "weights", "activations", "operations"]
    rows = [
        [
            cost.policy,
            cost.budget or _NONE,
            _NONE if cost.step_seconds is None else f"{1000 * cost.step_seconds:.0f} ms",
            _NONE if cost.seconds is None else f"{cost.seconds:.0f} s",
            _NONE if cost.peak_bytes is None else format_bytes(cost.peak_bytes),
            _NONE if cost.saved_bytes is None else format_bytes(cost.saved_bytes),
            *(_share(value) for value in (cost.weight_sparsity, cost.activation_sparsity, cost.flops_reduction)),
        ]
        for cost in summary.costs
    ]
    caption = (
        "Median time of a step and of a run; mean peak of a step and what it keeps for the backward pass; share of the "
        "weight gradients, of the activations and of the weight gradients' operations that is saved."
    )
    return Table(header, rows, caption)


def gap_table(summary: Summary) -> Table:
    """The cells without a result."""
    rows = [[_title(row), row.status, (row.message or _NONE).splitlines()[0]] for row in summary.gaps]
    caption = f"{_count(len(rows), 'cell')} of {len(summary.rows)} without a result."
    return Table(["cell", "status", "why"], rows, caption)


_AXES = ("model", "dataset", "seed")


def _title(row: Row) -> str:
    names = (row.model, row.dataset, row.budget, row.policy, f"seed {row.seed}")
    return " ".join(name for name in names if name is not None)


def _mean(mean: Mean) -> str:
    if mean.mean is None:
        return _NONE
    spread = "" if mean.spread is None else f" ± {100 * mean.spread:.2f}"
    note = "" if mean.cells == mean.expected else f" * {mean.cells}/{mean.expected}"
    return f"{100 * mean.mean:.2f}{spread}{note}"


def _of(rows: Sequence[Row], policy: str, summary: Summary) -> str:
    found = (getattr(row, summary.metric) for row in rows if row.policy == policy)
    values = [value for value in found if value is not None]
    return f"{100 * statistics.fmean(values):.2f}" if values else _NONE


def _p(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
