"""The result of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trady.ranking.ranking import LayerRanking
from trady.training.metrics import EpochMetrics, best_of


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        model: The plain model, trained.
        policy: Name of the policy.
        budget: The budget as text, e.g. ``peak:300 MiB``; ``None`` for plain full fine-tuning.
        history: One entry an epoch.
        seconds: Time over all epochs, those before a resume included.
        out: The run folder, if there is one.
        ranking: The layer ranking in use at the end, if the policy uses one.
    """

    model: nn.Module = field(repr=False)
    policy: str
    budget: str | None
    history: tuple[EpochMetrics, ...]
    seconds: float
    out: Path | None = None
    ranking: LayerRanking | None = field(default=None, repr=False)

    @property
    def accuracy(self) -> float:
        """Share of the evaluation set that is right after the last epoch, 0 to 1; NaN where a task has none."""
        found = self.history[-1].accuracy
        return math.nan if found is None else found

    @property
    def measures(self) -> Mapping[str, float]:
        """What else was measured after the last epoch, by name, such as ``macro_f1`` or ``perplexity``."""
        return self.history[-1].measures

    @property
    def best_epoch(self) -> int:
        """The first epoch with the highest accuracy, or the lowest evaluation loss where a task has no accuracy."""
        return best_of(self.history)

    @property
    def peak_bytes(self) -> int:
        """The highest measured peak of a training step, weights included."""
        return max(epoch.peak_bytes for epoch in self.history)

    @property
    def process_peak_bytes(self) -> int | None:
        """The most that was resident in the process; ``None`` where the system does not tell."""
        return max((e.process_peak_bytes for e in self.history if e.process_peak_bytes is not None), default=None)

    @property
    def saved_bytes(self) -> int:
        """The most bytes that a measured step kept between forward and backward."""
        return max(epoch.saved_bytes for epoch in self.history)

    @property
    def trainable_parameters(self) -> int:
        """The most elements that an epoch updated."""
        return max(epoch.trainable_parameters for epoch in self.history)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model, as in ``result.json``."""
        return {
            "policy": self.policy,
            "budget": self.budget,
            "epochs": len(self.history),
            "steps": self.history[-1].step,
            "accuracy": self.history[-1].accuracy,
            "best_accuracy": self.history[self.best_epoch].accuracy,
            "best_epoch": self.best_epoch,
            **({"measures": dict(self.measures)} if self.measures else {}),
            "train_loss": self.history[-1].train_loss,
            "peak_bytes": self.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "process_peak_bytes": self.process_peak_bytes,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
        }
