"""Cells that differ only in the policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from trady.compare.rows import Row

Metric = Literal["accuracy", "best_accuracy"]


@dataclass(frozen=True, order=True)
class Task:
    """What policies are compared on.

    Attributes:
        model: Its name in the matrix.
        dataset: Its name in the matrix.
        budget: Its name; empty where two policies without a budget are compared.
    """

    model: str
    dataset: str
    budget: str


@dataclass(frozen=True)
class Scores:
    """The accuracies of one policy, by task and seed.

    A policy that takes no budget has the same result under every budget.

    Attributes:
        policy: Its name.
        takes_budget: Whether it was run once a budget.
        by_task: Accuracy by seed, by task.
    """

    policy: str
    takes_budget: bool
    by_task: dict[Task, dict[int, float]]

    def without_budgets(self) -> Scores:
        """Return the scores with each result once, if the policy takes no budget."""
        if self.takes_budget:
            return self
        return Scores(
            self.policy, False, {Task(task.model, task.dataset, ""): seeds for task, seeds in self.by_task.items()}
        )


def budgets_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the names of the budgets, in the matrix' order; one without a name where there is none."""
    return tuple(dict.fromkeys(row.budget for row in rows if row.budget is not None)) or ("",)


def policies_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the policies: those that take a budget first, each kind in the matrix' order."""
    rows = list(rows)
    return tuple(dict.fromkeys(row.policy for row in [*(r for r in rows if r.budget is not None), *rows]))


def score(rows: Sequence[Row], policy: str, metric: Metric) -> Scores:
    """Collect the accuracies of a policy, from the cells that are done."""
    mine = [row for row in rows if row.policy == policy]
    takes_budget = any(row.budget is not None for row in mine)
    by_task: dict[Task, dict[int, float]] = {}
    for row in mine:
        value: float | None = getattr(row, metric)
        if not row.done or value is None:
            continue
        for budget in (row.budget,) if row.budget is not None else budgets_of(rows):
            by_task.setdefault(Task(row.model, row.dataset, budget), {})[row.seed] = value
    return Scores(policy, takes_budget, by_task)


def pairs(first: Scores, second: Scores) -> dict[Task, list[tuple[float, float]]]:
    """Return the accuracies of two policies on the tasks and seeds that both have."""
    if not (first.takes_budget or second.takes_budget):
        first, second = first.without_budgets(), second.without_budgets()
    found: dict[Task, list[tuple[float, float]]] = {}
    for task, seeds in first.by_task.items():
        others = second.by_task.get(task, {})
        matched = [(value, others[seed]) for seed, value in sorted(seeds.items()) if seed in others]
        if matched:
            found[task] = matched
    return found
