"""A task of the benchmarks: a model, one batch to train it on, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trady.estimates.unsuitable import MissingPackageError as MissingPackageError
from trady.estimates.unsuitable import needs as needs


@dataclass(frozen=True)
class Task:
    """A model and one batch to train it on.

    Attributes:
        model: Any module.
        batch: What it is called with: a tensor, or a mapping of keyword arguments; also the example for
            ``trady.prepare``.
        loss: The loss, from the model's output.
    """

    model: nn.Module
    batch: Any
    loss: Callable[[Any], Tensor]

    def run(self) -> Tensor:
        """Run the model on the batch; return the loss."""
        # Nothing here holds the output when the loss returns, so logits do not outlive the forward pass.
        return self.loss(self.model(**self.batch) if isinstance(self.batch, Mapping) else self.model(self.batch))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Task:
        """Return the task with its batch and labels on a device; the model moves there in place.

        Args:
            device: Where to.
            dtype: Of weights and floating-point inputs from then on; ``None`` leaves them.

        """

        @cache  # A tensor that is in the batch twice, such as ids that are their own labels, stays one.
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        loss = replace(self.loss, labels=moved(self.loss.labels)) if isinstance(self.loss, CrossEntropy) else self.loss
        return Task(self.model.to(device, dtype), tree_map_only(Tensor, moved, self.batch), loss)


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross entropy of class scores, given alone or as ``output.logits``.

    Attributes:
        labels: Class indices, [N].
    """

    labels: Tensor

    def __call__(self, output: Any) -> Tensor:
        """Return the loss of a model's output."""
        return F.cross_entropy(output if isinstance(output, Tensor) else output.logits, self.labels)


def own_loss(output: Any) -> Tensor:
    """Return the loss that the model computed itself, from the labels in the batch."""
    loss: Tensor = output.loss
    return loss


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with the same random weights every time; the generator stays where it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build()
