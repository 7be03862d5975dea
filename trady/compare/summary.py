"""The statistics of a table of cells, as values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from typing import Any

from trady.compare.matched import Metric, budgets_of, policies_of, score
from trady.compare.rows import Row
from trady.compare.statistics import Mean, Paired, Wins, adjust, compare_pair, count_wins, mean_accuracy


@dataclass(frozen=True)
class Cost:
    """What a policy takes at a budget: medians and means over the cells that are done.

    Attributes:
        policy: Its name.
        budget: Its name; ``None`` for a policy that takes none.
        step_seconds: Median over cells.
        seconds: Median over cells of a complete run.
        peak_bytes: Mean.
        saved_bytes: Mean.
        weight_sparsity: Mean; ``None`` where the policy has none.
        activation_sparsity: Mean.
        flops_reduction: Mean.
    """

    policy: str
    budget: str | None
    step_seconds: float | None
    seconds: float | None
    peak_bytes: float | None
    saved_bytes: float | None
    weight_sparsity: float | None
    activation_sparsity: float | None
    flops_reduction: float | None


@dataclass(frozen=True)
class Summary:
    """The comparison.

    Attributes:
        metric: What is compared.
        rows: All cells.
        policies: In the matrix' order.
        budgets: Their names.
        means: By policy and budget, and over all budgets.
        tests: Every pair of policies, over all budgets and at each.
        wins: Every ordered pair of policies.
        costs: By policy and budget.
    """

    metric: Metric
    rows: tuple[Row, ...]
    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    means: tuple[Mean, ...]
    tests: tuple[Paired, ...]
    wins: tuple[Wins, ...]
    costs: tuple[Cost, ...]

    @property
    def gaps(self) -> tuple[Row, ...]:
        """The cells without a result."""
        return tuple(row for row in self.rows if not row.done)

    def mean(self, policy: str, budget: str | None) -> Mean:
        """Return a policy's mean at a budget, or over all."""
        return next(mean for mean in self.means if (mean.policy, mean.budget) == (policy, budget))

    def test(self, first: str, second: str, budget: str | None = None) -> Paired | None:
        """Return the test of two policies as it was made; ``None`` where they share no cell."""
        wanted = (first, second, budget)
        return next((test for test in self.tests if (test.first, test.second, test.budget) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """Return all but the rows, which have their own files."""
        return {
            "metric": self.metric,
            "policies": list(self.policies),
            "budgets": list(self.budgets),
            "cells": {status: sum(row.status == status for row in self.rows) for status in _statuses(self.rows)},
            "means": [asdict(mean) for mean in self.means],
            "tests": [asdict(test) for test in self.tests],
            "wins": [asdict(wins) for wins in self.wins],
            "costs": [asdict(cost) for cost in self.costs],
        }


def summarize(rows: Sequence[Row], metric: Metric = "accuracy") -> Summary:
    """Compare the policies of a table of cells."""
    policies, budgets = policies_of(rows), budgets_of(rows)
    scores = {policy: score(rows, policy, metric) for policy in policies}
    tasks = len({(row.model, row.dataset, row.seed) for row in rows})
    means = [
        mean_accuracy(scores[policy], budget, tasks * (len(budgets) if budget is None else 1))
        for policy in policies
        for budget in (None, *budgets)
    ]
    tests: list[Paired] = []
    for budget in (None, *budgets) if len(budgets) > 1 else (None,):
        family = (compare_pair(scores[a], scores[b], budget) for a, b in combinations(policies, 2))
        tests += adjust([test for test in family if test is not None])
    wins = [count_wins(scores[a], scores[b]) for a, b in permutations(policies, 2)]
    return Summary(
        metric=metric,
        rows=tuple(rows),
        policies=policies,
        budgets=budgets,
        means=tuple(means),
        tests=tuple(tests),
        wins=tuple(wins),
        costs=tuple(_costs(rows, policies)),
    )


def _costs(rows: Sequence[Row], policies: Sequence[str]) -> list[Cost]:
    found = []
    for policy in policies:
        mine = [row for row in rows if row.policy == policy]
        for budget in dict.fromkeys(row.budget for row in mine):
            done = [row for row in mine if row.done and row.budget == budget]
            found.append(
                Cost(
                    policy=policy,
                    budget=budget,
                    step_seconds=_middle([row.step_seconds for row in done]),
                    seconds=_middle([row.seconds for row in done]),
                    peak_bytes=_average([row.peak_bytes for row in done]),
                    saved_bytes=_average([row.saved_bytes for row in done]),
                    weight_sparsity=_average([row.weight_sparsity for row in done]),
                    activation_sparsity=_average([row.activation_sparsity for row in done]),
                    flops_reduction=_average([row.flops_reduction for row in done]),
                )
            )
    return found


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _statuses(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.status for row in rows))
