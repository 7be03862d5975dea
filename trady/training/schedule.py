"""What depends on the step: the learning rate, and new draws.

The rate warms up linearly, then falls along a cosine to zero (SGDR, arXiv 1608.03983, one cycle).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trady.errors import TrainingError

#: Share of all steps that warms up; the paper warms up for 5 epochs of 50 (arXiv 2510.19675).
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Schedule:
    """The rate of every step, a pure function of its index.

    Attributes:
        peak_rate: The rate at the end of the warm-up; ``None`` until the optimizer that brings its own is made.
        steps: Number of steps of the run.
        warmup_steps: Steps until the peak rate is reached.
        began: Steps that were done when the cycle began: 0, unless epochs were added to a finished run.
    """

    peak_rate: float | None
    steps: int
    warmup_steps: int
    began: int = 0

    @property
    def peak(self) -> float:
        """The rate at the end of the warm-up, once it is known."""
        assert self.peak_rate is not None
        return self.peak_rate

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        step, steps = step - self.began, self.steps - self.began
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def known_by(self, groups: Sequence[Any]) -> Schedule:
        """Return it with the rate of an optimizer's first group, where none was given."""
        return self if self.peak_rate is not None else replace(self, peak_rate=_checked(float(groups[0]["lr"])))


def make_schedule(
    lr: float | None, epochs: int, steps_per_epoch: int, warmup_epochs: float | None, *, began: int = 0
) -> Schedule:
    """Return the schedule of a run.

    Args:
        lr: Rate at the end of the warm-up; ``None`` is that of an optimizer which is still to be made.
        epochs: Of the run.
        steps_per_epoch: Steps of an epoch.
        warmup_epochs: Length of the warm-up; by default a tenth of all steps.
        began: Epochs that were done when the cycle began.
    """
    if lr is not None:
        _checked(lr)
    steps, before = epochs * steps_per_epoch, began * steps_per_epoch
    if warmup_epochs is None:
        return Schedule(lr, steps, round(WARMUP_SHARE * (steps - before)), before)
    if not 0 <= warmup_epochs < epochs - began:
        raise TrainingError(f"warmup_epochs is {warmup_epochs}; it must be at least 0 and less than {epochs - began}")
    return Schedule(lr, steps, round(warmup_epochs * steps_per_epoch), before)


def _checked(lr: float) -> float:
    if not (math.isfinite(lr) and lr > 0):
        raise TrainingError(f"the learning rate is {lr}; it must be more than zero")
    return lr


def redraw_steps(draws: int, steps: int) -> frozenset[int]:
    """Return the steps of an epoch before which channels are drawn again, at equal distances.

    Args:
        draws: Draws in an epoch, at least 1, including the one at its beginning.
        steps: Steps of an epoch.

    Raises:
        TrainingError: There are more draws than steps.

    """
    if draws > steps:
        raise TrainingError(f"draws_per_epoch is {draws}, and an epoch has {steps} steps; give at most that many")
    return frozenset(draw * steps // draws for draw in range(1, draws))
