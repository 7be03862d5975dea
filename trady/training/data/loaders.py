"""Data sets as batches whose order is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import DataLoader, Dataset

from trady.errors import DataError
from trady.training.data.datasets import EpochSampler

Batches = DataLoader[Any]


def training_batches(data: Dataset[Any] | Batches, batch_size: int, seed: int) -> Batches:
    """Return shuffled batches; a loader that the user made is taken as it is.

    A last batch of a single example is left out: batch normalisation cannot train on it.
    """
    if isinstance(data, DataLoader):
        return data
    length = _length(data, "training")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1")
    drop_last = length > batch_size > 1 and length % batch_size == 1
    return DataLoader(data, batch_size, sampler=EpochSampler(length, seed), drop_last=drop_last)


def evaluation_batches(data: Dataset[Any] | Batches, batch_size: int) -> Batches:
    """Return batches in the data set's order."""
    if isinstance(data, DataLoader):
        return data
    _length(data, "evaluation")
    return DataLoader(data, batch_size)


def start_epoch(batches: Batches, epoch: int) -> None:
    """Tell a loader and its sampler which epoch's order comes next."""
    # Accelerate's loaders count epochs themselves unless they are told.
    for part in (batches, batches.sampler, getattr(batches.batch_sampler, "sampler", None), batches.dataset):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _length(data: Dataset[Any], purpose: str) -> int:
    if not isinstance(data, Sized):
        raise DataError(f"the {purpose} data has no length; give a map-style Dataset or a DataLoader")
    if not len(data):
        raise DataError(f"the {purpose} data is empty")
    return len(data)
