"""All statistics of a study, as one value: ``study.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from trady.study.heavy_tails import HeavyTails, heavy_tails
from trady.study.importance import TaskTest, importance
from trady.study.online import Online, budgets_of, online
from trady.study.records import Records
from trady.study.retained_gradient import Kept, kept
from trady.study.settings import FORMAT, StudySettings
from trady.study.stability import Stability, stability

_FORMAT = replace(FORMAT, name=f"{FORMAT.name}-statistics")


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Attributes:
        dataset: Its name.
        seed: Of the run.
        steps: Recorded steps.
        accuracy: Top-1 accuracy after the last epoch, 0 to 1.
    """

    dataset: str
    seed: int
    steps: int
    accuracy: float


@dataclass(frozen=True)
class Statistics:
    """The statistics of a study. Each part is documented where it is made.

    Attributes:
        settings: What the runs were made with.
        runs: What was run.
        layers: Number of layers.
        channels: Number of input channels of all layers.
        elements: C^W + C^A of all channels together.
        without_gradient: Layers that never saw a gradient in any run.
        heavy_tails: Observation 1 (:mod:`trady.study.heavy_tails`).
        stability: Observation 2 (:mod:`trady.study.stability`).
        importance: Observation 3 (:mod:`trady.study.importance`).
        kept: RGN against the raw norm (:mod:`trady.study.retained_gradient`).
        online: Online ranking against offline (:mod:`trady.study.online`).
    """

    settings: StudySettings
    runs: tuple[Run, ...]
    layers: int
    channels: int
    elements: int
    without_gradient: tuple[str, ...]
    heavy_tails: HeavyTails
    stability: Stability
    importance: tuple[TaskTest, ...]
    kept: tuple[Kept, ...]
    online: tuple[Online, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is not a number is ``None``."""
        return {**_FORMAT.header(), **_plain(self)}

    def summary(self) -> dict[str, Any]:
        """Return :meth:`to_json` without what is listed layer by layer and step by step, for readers to compare."""
        values = self.to_json()
        values["heavy_tails"].pop("layers")
        for test in values["importance"]:
            test.pop("layers")
        for name in ("units", "matrix"):
            values["stability"].pop(name)
        return values


def statistics(records: Records, budgets: Sequence[str] = ()) -> Statistics:
    """Compute everything.

    Args:
        records: What was recorded.
        budgets: In which online ranking is simulated, e.g. ``elements:27946``; three usual ones by default.

    Raises:
        BudgetError: A budget is not in elements, or too small.
        TrainingError: scipy or powerlaw is not installed.
    """
    amounts = budgets_of(records, budgets)
    first = records.table.names[0]
    last = records.settings.epochs - 1
    return Statistics(
        settings=records.settings,
        runs=tuple(
            Run(
                dataset,
                seed,
                len(records.steps(records.of(dataset, seed), first)),
                records.accuracy[records.of(dataset, seed, last)[0]],
            )
            for dataset, seed in records.runs
        ),
        layers=len(records.table),
        channels=records.table.channel_count,
        elements=records.table.all_elements,
        without_gradient=records.without_gradient,
        heavy_tails=heavy_tails(records),
        stability=stability(records),
        importance=importance(records),
        kept=kept(records),
        online=online(records, amounts),
    )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
