"""One optimizer step: forward, loss, backward, clipping, update; and the guard around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trady.errors import TrainingError
from trady.training.batch import Loss, forward, split_batch
from trady.training.precision import autocast
from trady.training.trainer import Trainer


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself: its loss, the gradient's norm before clipping, its examples."""

    loss: float
    gradient_norm: float
    examples: int


@dataclass(frozen=True)
class Stepper:
    """Everything that stays the same from step to step."""

    accelerator: Accelerator
    trainer: Trainer
    optimizer: torch.optim.Optimizer
    loss: Loss
    channel_clip: float | None
    max_grad_norm: float | None
    precision: str

    def __call__(self, batch: Any, parameters: Sequence[nn.Parameter], rate: float) -> StepResult:
        """Train on one batch.

        Raises:
            NotFiniteError: The loss or the gradient is not finite; the weights are as before, but for layers
                whose gradient was finite and that were updated inside the backward pass.
        """
        # Before the backward pass: an optimizer of trady.optim updates inside it.
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if "channel_clip" in group:
                group["channel_clip"] = self.channel_clip
        inputs, labels = split_batch(batch)
        with autocast(self.accelerator.device, self.precision):
            value = self.loss(forward(self.trainer.model, inputs), labels)
        loss = float(value.detach())
        if not math.isfinite(loss):
            raise NotFiniteError("loss", loss)
        self.accelerator.backward(value)
        self._average(parameters)
        norm = self.trainer.clip(self.channel_clip, self.max_grad_norm)
        if not math.isfinite(norm):
            raise NotFiniteError("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, len(labels))

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over processes: they are few, so no wrapper is needed for it."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")


class NotFiniteError(TrainingError):
    """A loss or gradient norm that is infinite or not a number."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"the {what} became {value}")
