"""What a process takes of a step, also in a run that goes on in another number of processes than it was started in.

The samples of a step are a setting of the run: when the processes are others, each takes another part of them. So
the steps, the learning rates and the draws stay what they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trady.errors import CheckpointError, TradyWarning
from trady.training.checkpoint import settings_of
from trady.tuner.parts import of_batch_statistics


@dataclass(frozen=True)
class Share:
    """What a process takes of a step.

    Attributes:
        batch_size: Samples of a step in this process; ``None`` where a loader of the user's own decides.
        started_batch_size: The same when the run was started: what its settings say.
        started_processes: How many processes it was started in.
        passes_of: Samples of a pass, where this process takes more than one did that the run was planned for.
    """

    batch_size: int | None
    started_batch_size: int | None
    started_processes: int
    passes_of: int | None = None

    def can_be_cut(self, optimizer: object, model: nn.Module) -> bool:
        """Whether a step may be several passes: nothing uses a gradient up, or normalises by the batch, before all."""
        waits = isinstance(optimizer, str) and not optimizer.endswith("-in-backward")
        return waits and of_batch_statistics(model) is None


def share_of_step(
    checkpoint: Path | None, batch_size: int | None, processes: int, *, fixed: bool, speaks: bool
) -> Share:
    """Return what a process takes of a step.

    Args:
        checkpoint: Of the run that goes on; ``None`` for one that starts.
        batch_size: Samples of a step in a process, as asked for: what the run was started with, or what it is now.
        processes: How many processes there are now.
        fixed: Whether a loader of the user's own makes the batches, which cannot be cut in another way.
        speaks: Whether to warn that the processes are others.

    Raises:
        CheckpointError: They cannot share the samples of a step evenly.
    """
    before = _started(checkpoint)
    asked = Share(batch_size, batch_size, processes)
    if before is None or batch_size is None or before.started_batch_size is None:
        return asked
    started, was = before.started_batch_size, before.started_processes
    samples = started * was
    if was == processes or batch_size not in (started, samples / processes):
        return asked  # the settings are compared, and say what is wrong
    if samples % processes:
        possible = [count for count in range(1, samples + 1) if samples % count == 0]
        shown = ", ".join(map(str, possible[:8])) + (", …" if len(possible) > 8 else "")
        raise CheckpointError(
            f"a step of this run has {samples} samples ({was} processes of {started}), which {processes} processes "
            f"cannot share evenly: go on in {shown} of them"
        )
    mine = samples // processes
    if fixed and batch_size != mine:
        raise CheckpointError(
            f"a step of this run has {samples} samples ({was} process{'es' * (was > 1)} of {started}), and the loader "
            f"given gives {batch_size} to each of {processes}: give one with batch_size={mine}"
        )
    if speaks:
        warnings.warn(
            f"the run was started in {was} process{'es' * (was > 1)} of {started} samples a step; it goes on in "
            f"{processes} of {mine}. A step has the same {samples} samples and the same rate; draws are the same too, "
            "unless a budget of the peak has other room now; dropout and augmentation take other random numbers",
            TradyWarning,
            stacklevel=3,
        )
    return Share(mine, started, was, started if mine > started else None)


def _started(checkpoint: Path | None) -> Share | None:
    """What the settings of a checkpoint say."""
    settings: Mapping[str, Any] = {} if checkpoint is None else settings_of(checkpoint)
    size, processes = settings.get("batch_size"), settings.get("processes") or 1
    if type(size) is not int or type(processes) is not int or min(size, processes) < 1:
        return None
    return Share(size, size, processes)
