"""What is written for each epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from trady.errors import CheckpointError
from trady.records.schema import AtLeast
from trady.records.versioned import Format

#: Samples a second: a run as slow as this would take years for each, and what is divided by it stays a number.
Speed = Annotated[float, AtLeast(1e-9)]

METRICS = Format(None, "metrics of a run", CheckpointError, "start the run again with --overwrite")


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: Counted from 0.
        step: Optimizer steps done at its end, since the run began.
        train_loss: Mean over the epoch's training examples.
        accuracy: Top-1 accuracy on the evaluation set after the epoch, 0 to 1.
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
    """

    epoch: int
    step: int
    train_loss: float
    accuracy: float
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

    def to_json(self) -> dict[str, Any]:
        """Return the line as a dict; a loss that is not finite becomes null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def has_stalled(history: Sequence[EpochMetrics], patience: int | None) -> bool:
    """Return whether accuracy has not risen for that many epochs; never where there is no such number."""
    best = max(history, key=lambda epoch: epoch.accuracy).epoch if history else 0
    return patience is not None and len(history) - 1 - best >= patience
