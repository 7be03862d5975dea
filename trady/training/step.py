"""One optimizer step: forward, loss, backward, clipping, update; and the guard against values that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from trady.errors import TrainingError
from trady.training.batch import (
    Loss,
    batch_errors,
    check_labels,
    cross_entropy,
    forward,
    logits,
    split_batch,
    unchecked_cross_entropy,
)
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
        channel_clip: Limit of a channel's gradient norm over the channel's own, or ``auto``.
        max_grad_norm: Limit of the head's gradient norm.
        precision: ``no`` or ``bf16``.
        captured: Replays the forward and backward pass of a part of a batch; ``None`` runs it.
    """

    accelerator: Accelerator
    trainer: Trainer
    optimizer: torch.optim.Optimizer
    loss: Loss
    channel_clip: float | str | None
    max_grad_norm: float | None
    precision: str
    captured: CapturedPass | None = None

    def __call__(self, batch: Any, rate: float) -> StepResult:
        """Train on one batch.

        Raises:
            ResourceError: The memory of a GPU ran out.
            NotFiniteError: The loss or the gradient is not finite. The weights are as before, except in layers
                that were updated inside the backward pass with a finite gradient.
        """
        try:
            return self._step(batch, rate)
        except torch.OutOfMemoryError as error:  # of a GPU
            raise self.trainer.out_of_memory(split_batch(batch)[0], error) from error

    def _step(self, batch: Any, rate: float) -> StepResult:
        # Before the backward pass: an optimizer of trady.optim updates inside it.
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if "channel_clip" in group:
                group["channel_clip"] = self.trainer.channel_limit(self.channel_clip)
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
        if self.captured is not None:
            with batch_errors(inputs, labels):
                return _finite_loss(self.captured(inputs, labels, share))
        with batch_errors(inputs, labels), autocast(self.accelerator.device, self.precision):
            value = self.loss(forward(self.trainer.model, inputs), labels)
        loss = _finite_loss(value)
        self.accelerator.backward(value if share == 1.0 else value * share)
        return loss


class CapturedPass:
    """The forward and backward pass of a part of a batch, replayed until the next draw: :meth:`trady.Tuner.capture`.

    Nothing of it waits for the device: labels are looked at in front of it, the loss behind it.

    Args:
        accelerator: Where it runs.
        trainer: What is trained, and how.
        loss: From (output, labels) to the mean over the samples.
        precision: ``no`` or ``bf16``.
    """

    def __init__(self, accelerator: Accelerator, trainer: Trainer, loss: Loss, precision: str) -> None:
        self._accelerator, self._trainer, self._loss, self._precision = accelerator, trainer, loss, precision
        self._classes: int | None = None
        self._replayed = trainer.capture(self._passes)

    def __call__(self, inputs: Any, labels: torch.Tensor, share: float) -> torch.Tensor:
        """Add the gradients of a part of the batch, weighted by its share of the samples; return its loss."""
        if self._classes is not None:
            check_labels(labels, self._classes)
        loss: torch.Tensor = self._replayed(inputs, labels, share)
        return loss

    def _passes(self, inputs: Any, labels: torch.Tensor, share: float) -> torch.Tensor:
        with autocast(self._accelerator.device, self._precision):
            value = self._loss_of(forward(self._trainer.model, inputs), labels)
        self._accelerator.backward(value if share == 1.0 else value * share)
        return value.detach()

    def _loss_of(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        if self._loss is not cross_entropy:
            return self._loss(output, labels)
        if self._classes is None:  # the very first pass, which is never recorded
            check_labels(labels, logits(output).shape[-1])
            self._classes = logits(output).shape[-1]
        return unchecked_cross_entropy(output, labels)


def _finite_loss(value: torch.Tensor) -> float:
    loss = float(value.detach())
    if not math.isfinite(loss):
        raise NotFiniteError("loss", loss)
    return loss


class NotFiniteError(TrainingError):
    """A loss or gradient norm that is infinite or not a number."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"the {what} became {value}")
