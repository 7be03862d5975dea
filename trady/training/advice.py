"""What a run that does not learn is told: what it reached, what guessing reaches, and what to type instead."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from trady.training.metrics import EpochMetrics

#: Fewer labels tell chance from learning too badly to speak of it.
_ENOUGH_LABELS = 50

#: Optimizer steps before which nothing can be said of a rate.
_ENOUGH_STEPS = 30

#: Standard errors of an accuracy within which it counts as that of guessing.
_NEAR = 2.0

#: A loss this many times that of guessing, after an epoch of training, says that steps are too large.
_FAR = 1.5


@dataclass
class Guessing:
    """What is reached without looking at the inputs, counted from the labels of the evaluation.

    Attributes:
        labels: How often each class occurs.
    """

    labels: Counter[int] = field(default_factory=Counter)
    _told: bool = field(default=False, init=False)

    def see(self, labels: torch.Tensor) -> None:
        """Count class indices; labels of any other form are none."""
        if labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
            self.labels.update(label for label in labels.tolist() if label >= 0)

    @property
    def accuracy(self) -> float:
        """Of always naming the most frequent class, 0 to 1."""
        return max(self.labels.values(), default=0) / max(1, self.labels.total())

    @property
    def loss(self) -> float:
        """Cross entropy of always giving each class its share, in nats."""
        count = self.labels.total()
        return -sum(n / count * math.log(n / count) for n in self.labels.values())

    def remark(self, metrics: EpochMetrics, rate: float, usual: float | None, *, last: bool) -> str | None:
        """Say that an epoch has learnt nothing, and what to try: the first one that has not, and the last.

        ``None`` where it has, or nobody can tell.

        Args:
            metrics: Of the epoch.
            rate: Learning rate at the end of the warm-up.
            usual: The default of the optimizer; ``None`` where the loss or the optimizer is somebody's own.
            last: Whether the run ends with it.
        """
        count = self.labels.total()
        if count < _ENOUGH_LABELS or len(self.labels) < 2 or metrics.accuracy is None:
            return None
        chance = self.accuracy
        at_chance = metrics.accuracy <= chance + _NEAR * math.sqrt(chance * (1 - chance) / count)
        # The loss of somebody's own function is not to be compared with a cross entropy.
        far = usual is not None and metrics.train_loss > _FAR * self.loss
        if not (at_chance or far) or (self._told and not last):
            return None
        self._told = True
        found = f"accuracy {metrics.accuracy:.1%} after epoch {metrics.epoch + 1}, and guessing has {chance:.1%}"
        if usual is None:
            return f"{found}: if it stays so, try another rate than {rate:.3g} (--lr, lr=), and look at the labels"
        losses = f"; loss {metrics.train_loss:.3g}, and guessing has {self.loss:.3g}"
        return f"{found}{losses}. {self._instead(metrics.train_loss, metrics.step, rate, usual)}"

    def _instead(self, loss: float, steps: int, rate: float, usual: float) -> str:
        if not 0.5 <= rate / usual <= 2:
            return (
                f"The rate, {rate:.3g}, is {'high' if rate > usual else 'low'} for this optimizer: leave --lr (lr=) "
                f"out for its default, {usual:.3g}"
            )
        if steps < _ENOUGH_STEPS:
            return f"It had {steps} steps: train for more epochs (--epochs, epochs=), or on more data"
        wrong, other = ("high", rate / 5) if loss > self.loss else ("low", rate * 3)
        return (
            f"The rate, {rate:.3g}, may be too {wrong} for this model: try --lr {other:.2g} (lr={other:.2g}). If that "
            "does not help, look at the labels and at the normalization of the images"
        )


def lower_rate(rate: float) -> str:
    """Say what to try where a loss has become infinite or no number."""
    return (
        f"Try a lower rate (--lr {rate / 4:.2g}), a longer warm-up (--warmup-epochs) or tighter clipping "
        "(--channel-clip, --max-grad-norm)"
    )
