"""A run that goes on from its checkpoint: as it was planned, or with epochs added to those that it has finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trady.errors import CheckpointError
from trady.training.checkpoint import Checkpoint, check_settings
from trady.training.schedule import Schedule, make_schedule
from trady.training.settings import Settings

#: What differs where epochs were added.
_OF_LENGTH = ("epochs", "steps", "warmup_steps", "added_at")


def going_on(
    checkpoint: Checkpoint,
    settings: Settings,
    schedule: Schedule,
    warmup_epochs: float | None,
    place: Path,
    data: Mapping[str, Any] | None,
) -> tuple[Settings, Schedule]:
    """Return the settings and the schedule of a run that goes on from a checkpoint.

    Added epochs are a second cycle of the same schedule: the rate warms up and falls once more (SGDR, arXiv
    1608.03983).

    Args:
        checkpoint: Where the run stands.
        settings: What is asked for.
        schedule: Of a run with these settings that begins.
        warmup_epochs: Length of the warm-up, as it was given.
        place: The checkpoint, for messages.
        data: What the data is.

    Raises:
        CheckpointError: The run has other settings or other data, or is not finished and is to get more epochs.
    """
    before, done = checkpoint.settings.get("epochs"), checkpoint.epoch + 1
    added_at = checkpoint.settings.get("added_at")
    expected = settings.to_json()
    more = False
    if isinstance(before, int) and before < settings.epochs:
        more = True
        if done < before:
            raise CheckpointError(
                f"{place} has {done} of {before} epochs, and more can be added to a finished run only: finish it with "
                f"--epochs {before} --resume (epochs={before}, resume=True), then add them"
            )
        added_at = before
        expected |= {name: checkpoint.settings.get(name) for name in _OF_LENGTH}
    if isinstance(added_at, int) and 0 < added_at < settings.epochs:
        steps = schedule.steps // settings.epochs
        schedule = make_schedule(schedule.peak_rate, settings.epochs, steps, warmup_epochs, began=added_at)
        settings = replace(settings, added_at=added_at, warmup_steps=schedule.warmup_steps)
    check_settings(checkpoint, expected if more else settings.to_json(), place, data)
    return settings, schedule
