"""What depends on the step: the learning rate, and new draws.

The rate warms up linearly, then falls along a cosine to zero (SGDR, arXiv 1608.03983, one cycle).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trady.errors import TrainingError

#: Share of all steps that warms up; the paper warms up for 5 epochs of 50 (arXiv 2510.19675).
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Schedule:
    """The rate of every step, a pure function of its index.

    Attributes:
        peak_rate: The rate at the end of the warm-up.
        steps: Number of steps of the run.
        warmup_steps: Steps until the peak rate is reached.
    """

    peak_rate: float
    steps: int
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_schedule(lr: float, epochs: int, steps_per_epoch: int, warmup_epochs: float | None) -> Schedule:
    """Return the schedule of a run; without ``warmup_epochs`` a tenth of all steps warms up."""
    if not (math.isfinite(lr) and lr > 0):
        raise TrainingError(f"the learning rate is {lr}; it must be more than zero")
    steps = epochs * steps_per_epoch
    if warmup_epochs is None:
        return Schedule(lr, steps, round(WARMUP_SHARE * steps))
    if not 0 <= warmup_epochs < epochs:
        raise TrainingError(f"warmup_epochs is {warmup_epochs}; it must be at least 0 and less than {epochs}")
    return Schedule(lr, steps, round(warmup_epochs * steps_per_epoch))


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
