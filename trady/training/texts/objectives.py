"""What is asked of a model of texts: the loss of each task, and its measures.

The values of an example are what the model says followed by what is right, so that the parts of a text that was cut
(``--overflow split``) can be put together: the mean of what the model says of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trady.errors import DataError
from trady.training.batch import Loss, cross_entropy, logits
from trady.training.texts.dataset import NO_LOSS

Rows = npt.NDArray[np.int64]


def mean_of_parts(values: Tensor, rows: Rows | None) -> Tensor:
    """Return the mean over the examples of each text, ``[texts, …]``, in the order in which the texts come first."""
    if rows is None:
        return values
    _, first, place = np.unique(rows, return_index=True, return_inverse=True)
    order = torch.from_numpy(np.argsort(np.argsort(first)))[torch.from_numpy(place)]
    sums = torch.zeros(len(first), *values.shape[1:], dtype=torch.float64).index_add_(0, order, values.double())
    counts = torch.bincount(order, minlength=len(first)).view(-1, *[1] * (values.dim() - 1))
    return (sums / counts).to(values.dtype)


@dataclass(frozen=True)
class Classification:
    """One class a text.

    Attributes:
        classes: Number of the classes.
        rows: Of each evaluated example, the number of its text, where texts were cut; ``None`` where none was.
        loss: Cross entropy.
    """

    classes: int
    rows: Rows | None = field(default=None, repr=False, compare=False)
    loss: Loss = cross_entropy

    def values(self, output: Any, labels: Tensor) -> Tensor:
        """Return scores and label, ``[N, classes + 1]``."""
        return torch.cat([logits(output).float(), labels[:, None].float()], 1)

    def measure(self, values: Tensor) -> tuple[float, Mapping[str, float]]:
        """Return accuracy, and F1 averaged over the classes."""
        values = mean_of_parts(values, self.rows)
        said, right = values[:, :-1].argmax(-1), values[:, -1].long()
        return int((said == right).sum()) / len(right), {"macro_f1": macro_f1(said, right, self.classes)}


def macro_f1(said: Tensor, right: Tensor, classes: int) -> float:
    """Return the F1 score of each class, averaged over those that are said or right at all."""
    pairs = torch.bincount(right * classes + said, minlength=classes * classes).view(classes, classes)
    both = pairs.sum(0) + pairs.sum(1)
    there = both > 0
    return float((2 * pairs.diagonal()[there] / both[there]).double().mean())


@dataclass(frozen=True)
class Regression:
    """A number a text."""

    rows: Rows | None = field(default=None, repr=False, compare=False)

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(_one_number(logits(output)).float(), labels.float())

    def values(self, output: Any, labels: Tensor) -> Tensor:
        """Return what the model says and what is right, ``[N, 2]``."""
        return torch.stack([_one_number(logits(output)).float(), labels.float()], 1)

    def measure(self, values: Tensor) -> tuple[None, Mapping[str, float]]:
        """Return the mean squared error and Pearson's correlation; 0 where one side is constant."""
        said, right = mean_of_parts(values, self.rows).double().unbind(1)
        spread = (said - said.mean()).norm() * (right - right.mean()).norm()
        product = ((said - said.mean()) * (right - right.mean())).sum()
        return None, {"mse": float(F.mse_loss(said, right)), "pearson": float(product / spread) if spread > 0 else 0.0}


def _one_number(scores: Tensor) -> Tensor:
    if scores.shape[-1] != 1:
        raise DataError(f"the model gives {scores.shape[-1]} numbers a text, and a regression has one: num_labels=1")
    return scores[..., 0]


@dataclass(frozen=True)
class MultiLabel:
    """Any of several labels a text."""

    rows: Rows | None = field(default=None, repr=False, compare=False)

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """Return the binary cross entropy, a mean over texts and labels."""
        return F.binary_cross_entropy_with_logits(logits(output).float(), labels.float())

    def values(self, output: Any, labels: Tensor) -> Tensor:
        """Return scores and labels, ``[N, 2 × labels]``."""
        return torch.cat([logits(output).float(), labels.float()], 1)

    def measure(self, values: Tensor) -> tuple[float, Mapping[str, float]]:
        """Return the share of texts with all labels right, and F1 over all labels and averaged over them."""
        scores, right = mean_of_parts(values, self.rows).chunk(2, dim=1)
        said, right = scores > 0, right > 0.5
        hits, both = (said & right).sum(0).double(), said.sum(0).double() + right.sum(0).double()
        there = both > 0
        macro = float((2 * hits[there] / both[there]).mean()) if there.any() else 0.0
        micro = float(2 * hits.sum() / both.sum()) if there.any() else 0.0
        return int((said == right).all(1).sum()) / len(right), {"macro_f1": macro, "micro_f1": micro}


@dataclass(frozen=True)
class NextToken:
    """The next token at each place that has a label."""

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """Return the mean over the sequences of each one's mean cross entropy.

        So a batch in parts, or over several processes, has the gradient of the whole batch, whatever is padded.
        """
        total, count = _of_sequences(output, labels)
        return (total / count.clamp(min=1)).mean()

    def values(self, output: Any, labels: Tensor) -> Tensor:
        """Return the sum of the losses and their number, ``[N, 2]``."""
        return torch.stack(_of_sequences(output, labels), 1)

    def measure(self, values: Tensor) -> tuple[None, Mapping[str, float]]:
        """Return the perplexity: e to the mean loss of a token."""
        total, count = values.double().sum(0).tolist()
        return None, {"perplexity": math.exp(min(total / max(count, 1.0), 700.0))}


def _of_sequences(output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each sequence the sum of its losses, and their number."""
    scores = logits(output)
    # The labels are shifted, not the scores: a slice of those would be copied.
    wanted = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), NO_LOSS)], 1)
    losses = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=NO_LOSS, reduction="none")
    return losses.float().view(wanted.shape).sum(1), (wanted != NO_LOSS).sum(1).float()
