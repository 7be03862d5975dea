"""One optimizer step: forward, loss, backward, clipping, update; and the guard against values that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from trady.errors import TrainingError
from trady.training.batch import Loss, batch_errors, forward, split_batch
from trady.training.precision import autocast
from trady.training.trainer import Trainer


@dataclass(frozen=True)
class StepResult:
    """The loss of a step, the norm of its gradient before clipping, and its number of examples."""

    loss: float
    gradient_norm: float
    examples: int


@dataclass(frozen=True)
class Stepper:
    """Everything that stays the same from step to step.

    Attributes:
        accelerator: Where it runs.
        trainer: What is trained, and how.
        optimizer: Updates it.
        loss: From (output, labels) to the mean over the samples.
        channel_clip: Limit of a channel's gradient norm over the channel's own.
        max_grad_norm: Limit of the head's gradient norm.
        precision: ``no`` or ``bf16``.
    """

    accelerator: Accelerator
    trainer: Trainer
    optimizer: torch.optim.Optimizer
    loss: Loss
    channel_clip: float | None
    max_grad_norm: float | None
    precision: str

    def __call__(self, batch: Any, rate: float) -> StepResult:
        """Train on one batch.

        Raises:
            NotFiniteError: The loss or the gradient is not finite. The weights are as before, except in layers
                that were updated inside the backward pass with a finite gradient.
        """
        # Before the backward pass: an optimizer of trady.optim updates inside it.
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if "channel_clip" in group:
                group["channel_clip"] = self.channel_clip
        loss, examples = 0.0, len(split_batch(batch)[1])
        for inputs, labels, share in self.trainer.parts(batch):
            loss += self._gradients_of(inputs, labels, share) * share
        self.trainer.average()
        norm = self.trainer.clip(self.channel_clip, self.max_grad_norm)
        if not math.isfinite(norm):
            raise NotFiniteError("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, examples)

    def _gradients_of(self, inputs: Any, labels: torch.Tensor, share: float) -> float:
        """Add the gradients of a part of the batch, weighted by its share of the samples; return its loss."""
        with batch_errors(inputs, labels), autocast(self.accelerator.device, self.precision):
            value = self.loss(forward(self.trainer.model, inputs), labels)
        loss = float(value.detach())
        if not math.isfinite(loss):
            raise NotFiniteError("loss", loss)
        self.accelerator.backward(value if share == 1.0 else value * share)
        return loss


class NotFiniteError(TrainingError):
    """A loss or gradient norm that is infinite or not a number."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"the {what} became {value}")
