"""Batches as pairs or dicts, and how a model and a loss take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady.errors import DataError
from trady.model.batch import Batch

#: Takes the model's output and the labels, gives a scalar.
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def split_batch(batch: Any) -> tuple[Any, torch.Tensor]:
    """Return a batch's inputs and labels: of a pair, or of a dict with ``labels``."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], torch.Tensor):
        return batch[0], batch[1]
    raise DataError(f"a batch is a {type(batch).__name__}; expected a pair (inputs, labels), or a dict with 'labels'")


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call the model as :meth:`trady.model.batch.Batch.of` reads its inputs."""
    args, kwargs = Batch.of(inputs, model).arguments
    return model(*args, **kwargs)


def logits(output: Any) -> torch.Tensor:
    """Return the class scores in a model's output: the tensor itself, or its ``logits``."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None:
        found = output
    if not isinstance(found, torch.Tensor):
        raise DataError(
            f"the model returns a {type(output).__name__}; expected class scores, or an output with .logits"
        )
    return found


def cross_entropy(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy; refuse labels that the model has no output for."""
    scores = logits(output)
    check_labels(labels, scores.shape[-1])
    return F.cross_entropy(scores, labels)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raise :class:`DataError` unless every label is a class index below ``classes``."""
    if labels.is_floating_point():
        raise DataError(f"labels are {labels.dtype}; cross entropy takes class indices (int64)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {classes} classes: 0 to {classes - 1} are possible"
        )
