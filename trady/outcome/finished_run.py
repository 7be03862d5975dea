"""A run folder as it is read for a page; nothing of it is loaded or trained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trady.errors import CheckpointError
from trady.planning.budget import parse_budget
from trady.planning.plan import Plan
from trady.report.units import format_bytes
from trady.training.description import RunDescription, read_description
from trady.training.metrics import METRICS, EpochMetrics, best_of
from trady.training.run_folder import RunFolder

#: The policy that trains everything, without a plan.
FULL = "full"


@dataclass(frozen=True)
class FinishedRun:
    """What a page says of one run.

    Attributes:
        path: Its folder.
        description: What ``run.json`` says.
        history: One entry an epoch that is done.
        plan: What was decided before the first step; ``None`` of full fine-tuning in plain PyTorch.
    """

    path: Path
    description: RunDescription
    history: tuple[EpochMetrics, ...]
    plan: Plan | None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def last(self) -> EpochMetrics:
        """The last epoch that is done."""
        return self.history[-1]

    @property
    def best(self) -> EpochMetrics:
        """The first epoch of the highest accuracy or, where a task has none, of the lowest evaluation loss."""
        return self.history[best_of(self.history)]

    @property
    def peak_bytes(self) -> int:
        """The highest measured peak of a step, weights included."""
        return max(epoch.peak_bytes for epoch in self.history)

    @property
    def limit_bytes(self) -> int | None:
        """The largest peak that was allowed, weights included; ``None`` where the budget was of another kind."""
        return None if self.description.budget is None else parse_budget(self.description.budget).peak_bytes

    @property
    def budget(self) -> str:
        """The budget for people."""
        if self.description.budget is None:
            return "no limit"
        budget = parse_budget(self.description.budget)
        amount = format_bytes(budget.amount) if budget.scope.in_bytes else f"{budget.amount:,}".replace(",", " ")
        return f"{budget.scope} {amount}"


def read_run(path: str | os.PathLike[str]) -> FinishedRun:
    """Read a run folder.

    Raises:
        CheckpointError: It is none, a file of it is damaged, or no epoch is done.
    """
    folder = RunFolder(Path(path))
    description = read_description(path)
    lines = METRICS.read_lines(EpochMetrics, folder.metrics, until_damage=True) if folder.metrics.exists() else []
    if not lines:
        raise CheckpointError(
            f"{path}: no epoch of this run is done, so there is nothing to report; go on with it (--resume) first"
        )
    planned = description.policy != FULL and folder.plan.exists()
    return FinishedRun(folder.path, description, tuple(lines), Plan.load(folder.plan) if planned else None)
