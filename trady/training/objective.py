"""What a model is trained for: its loss, and what is measured on data that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trady.training.batch import Loss, cross_entropy, logits


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        accuracy: Share of the examples that are right, 0 to 1; ``None`` where nothing is right or wrong.
        loss: Mean over the examples.
        measures: What else was measured, by name: ``macro_f1``, ``perplexity``, …
    """

    accuracy: float | None
    loss: float
    measures: Mapping[str, float]


class Objective(Protocol):
    """The loss of a task, and its measures."""

    @property
    def loss(self) -> Loss:
        """From (output, labels) to the mean over the samples."""

    def values(self, output: Any, labels: Tensor) -> Tensor:
        """Return what the measures need of each example, ``[N, …]``; that of all processes is put together."""

    def measure(self, values: Tensor) -> tuple[float | None, Mapping[str, float]]:
        """Return the accuracy, if there is one, and the other measures, of all examples in their order."""


@dataclass(frozen=True)
class TopOne:
    """Class scores of which the highest is to be that of the label; the accuracy alone is measured."""

    loss: Loss = cross_entropy

    def values(self, output: Any, labels: Tensor) -> Tensor:
        """Return whether each label has the highest score."""
        return logits(output).argmax(-1) == labels

    def measure(self, values: Tensor) -> tuple[float, Mapping[str, float]]:
        """Return the share of those that have."""
        return int(values.sum()) / len(values), {}


def objective_of(data: Any, loss: Loss | None) -> Objective:
    """Return what is asked of a model by the data that it is trained on.

    Args:
        data: A data set, or a loader of one; one with an ``objective`` says itself.
        loss: In place of the data's own, by somebody who has chosen one.
    """
    found: Objective | None = getattr(getattr(data, "dataset", data), "objective", None)
    if found is not None and loss is None:
        return found
    return TopOne(loss or cross_entropy)


def of_output(loss: Loss, labels: Tensor) -> Callable[[Any], Tensor]:
    """Return a loss of the output alone, for a plan: a part of a batch, or more of it, has as many of the labels."""

    def found(output: Any) -> Tensor:
        count = len(logits(output))
        return loss(output, labels if count == len(labels) else labels[torch.arange(count) % len(labels)])

    return found


def joined(parts: list[Tensor]) -> Tensor:
    """Return the values of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
