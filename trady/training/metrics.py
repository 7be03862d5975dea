"""What is written for each epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from trady.errors import CheckpointError
from trady.records.schema import AtLeast
from trady.records.versioned import Format

#: Samples a second: a run as slow as this would take years for each, and what is divided by it stays a number.
Speed = Annotated[float, AtLeast(1e-9)]

METRICS = Format(None, "metrics of a run", CheckpointError, "start the run again with --overwrite")


#: Measures that people write in another way.
_NAMES = {"macro_f1": "macro F1", "micro_f1": "micro F1", "mse": "mean squared error", "pearson": "Pearson's r"}


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: Counted from 0.
        step: Optimizer steps done at its end, since the run began.
        train_loss: Mean over the epoch's training examples.
        accuracy: Share of the evaluation set that is right after the epoch, 0 to 1; ``None`` where a task has none.
        seconds: Time that the epoch took, evaluation included.
        peak_bytes: Peak tensor memory of the epoch's first step, weights included.
        channels: Number of selected input channels at the epoch's end.
        selection_hash: Digest of those channels; equal digests mean equal channels.
        evaluation_loss: Mean loss on the evaluation set.
        saved_bytes: Bytes that the epoch's first step kept between forward and backward.
        trainable_parameters: Elements that the optimizer updated.
        lr: Learning rate of the epoch's last step.
        samples_per_second: Training examples a second, evaluation and measurements excluded.
        micro_batch: Samples of a forward and backward pass; ``None`` is the full batch.
        observing_seconds: How much of ``seconds`` the policy's measurements took.
        process_bytes: Resident memory of the process at the epoch's end; ``None`` where the system does not tell.
        process_peak_bytes: The most that was resident since the process began, imports and evaluation included.
        averaged_bytes: Bytes of gradients that a step averages over processes; 0 in one process.
        averaging_calls: Collectives that it takes.
        measures: What else was measured on the evaluation set: ``macro_f1``, ``perplexity``, …
    """

    epoch: int
    step: int
    train_loss: float
    accuracy: float | None
    seconds: float
    peak_bytes: int
    channels: int
    selection_hash: str
    evaluation_loss: float
    saved_bytes: int
    trainable_parameters: int
    lr: float
    samples_per_second: Speed
    micro_batch: int | None = None
    observing_seconds: float = 0.0
    process_bytes: int | None = None
    process_peak_bytes: int | None = None
    averaged_bytes: int = 0
    averaging_calls: int = 0
    measures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the line as a dict; a loss that is not finite becomes null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
            if key != "measures" or value
        }

    @property
    def quality(self) -> float:
        """What epochs are compared by: the accuracy or, where a task has none, how low the evaluation loss is."""
        return -self.evaluation_loss if self.accuracy is None else self.accuracy

    def __str__(self) -> str:
        """Return what was measured, for people."""
        figures = [] if self.accuracy is None else [f"accuracy {self.accuracy:.1%}"]
        figures += [told(name, value) for name, value in self.measures.items()]
        return ", ".join(figures)


def best_of(history: Sequence[EpochMetrics]) -> int:
    """Return the first epoch of the highest quality."""
    return max(history, key=lambda epoch: epoch.quality).epoch


def told(name: str, value: float) -> str:
    """Return a measure for people: ``macro F1 0.912``."""
    return f"{_NAMES.get(name, name.replace('_', ' '))} {value:.3f}"


def has_stalled(history: Sequence[EpochMetrics], patience: int | None) -> bool:
    """Return whether no epoch was better for that many; never where there is no such number."""
    best = best_of(history) if history else 0
    return patience is not None and len(history) - 1 - best >= patience
