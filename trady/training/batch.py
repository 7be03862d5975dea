"""Batches as pairs or dicts, and how a model and a loss take them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady.errors import DataError, ResourceError, TradyError
from trady.errors import __file__ as trady_errors
from trady.model.batch import Batch
from trady.records.translated import in_our_words

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
    check_labels(labels, logits(output).shape[-1])
    return unchecked_cross_entropy(output, labels)


def unchecked_cross_entropy(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of labels that were looked at before; the host waits for nothing."""
    scores = logits(output)
    return F.cross_entropy(scores, labels if labels.dtype == torch.int64 else labels.long())


@contextmanager
def batch_errors(inputs: Any, labels: torch.Tensor) -> Iterator[None]:
    """Say in our words that PyTorch cannot compute with a batch; errors of a person's own code stay as they are."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (TradyError, torch.OutOfMemoryError)) or not _of_pytorch(error):
            raise
        if isinstance(lack := in_our_words(error), ResourceError):
            raise lack from error
        said = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the model or the loss cannot take a batch of inputs {Batch.of(inputs).shapes} with labels "
            f"{list(labels.shape)} {labels.dtype}: {said[:300]}; the run's last checkpoint is as it was. Give the "
            "data as the model takes them: their channels, size, dtype and labels"
        ) from error


def readable(batches: Iterable[Any]) -> Iterator[Any]:
    """Return the batches, and say in our words that examples cannot be put together into one.

    Raises:
        DataError: Examples have other shapes than their neighbours, or are no tensors.
    """
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, TypeError) as error:
            if not _of_collation(error):
                raise
            said = str(error).strip().rpartition("\n")[2]
            raise DataError(
                f"examples of the data cannot be put together into a batch: {said[:300]}. Give all of them the same "
                "shape, as tensors, or a DataLoader with a collate_fn of yours"
            ) from error
        yield batch


def _of_pytorch(error: BaseException) -> bool:
    """Return whether PyTorch raised an error: in a frame of its own, or called from one of trady's."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename if frames else ""
    return last.startswith(_PYTORCH) or (type(error) is RuntimeError and last.startswith(_TRADY))


def _of_collation(error: BaseException) -> bool:
    """Return whether an error came up in the function of PyTorch's that makes batches, here or in a worker process."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.endswith("collate.py") for frame in frames) or "collate.py" in str(error)


_PYTORCH, _TRADY = (str(Path(package).parent) for package in (torch.__file__, trady_errors))


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raise :class:`DataError` unless every label is a class index below ``classes``."""
    if labels.is_floating_point():
        raise DataError(f"labels are {labels.dtype}; cross entropy takes class indices (int64)")
    if not labels.numel():
        raise DataError("a batch has no labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {classes} classes: 0 to {classes - 1} are possible"
        )
