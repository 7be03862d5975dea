"""Data sets as batches whose order is a pure function of (seed, epoch)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from trady.errors import DataError
from trady.training.data.augment import as_it_is
from trady.training.data.datasets import EpochSampler, ImageDataset
from trady.training.randomness import reading_randomness
from trady.training.texts.dataset import LengthSampler, TextDataset

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
    if isinstance(data, TextDataset):
        of_like_length = LengthSampler(data.lengths, batch_size, seed)
        return DataLoader(data, batch_size, sampler=of_like_length, collate_fn=data.collate)
    drop_last = length > batch_size > 1 and length % batch_size == 1
    return DataLoader(data, batch_size, sampler=EpochSampler(length, seed), drop_last=drop_last)


def evaluation_batches(data: Dataset[Any] | Batches, batch_size: int) -> Batches:
    """Return batches in the data set's order."""
    if isinstance(data, DataLoader):
        return data
    _length(data, "evaluation")
    return DataLoader(data, batch_size, collate_fn=data.collate if isinstance(data, TextDataset) else None)


def on_device(batches: Batches, accelerator: Accelerator) -> Batches:
    """Return batches that come on the device of a run: one at a time, or over several processes, one read ahead.

    Accelerate reads one batch ahead to know which is the last, which only processes that share the samples need. It
    would stay in memory all through a step.
    """
    if accelerator.num_processes > 1:
        shared: Batches = accelerator.prepare_data_loader(batches)
        return shared
    return batches if accelerator.device.type == "cpu" else cast("Batches", _Sent(batches, accelerator.device))


class _Sent:
    """A loader whose batches are sent to a device."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield send_to_device(batch, self._device)

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def start_epoch(batches: Batches, epoch: int) -> None:
    """Tell a loader and its sampler which epoch's order comes next."""
    # Accelerate's loaders count epochs themselves unless they are told.
    for part in (batches, batches.sampler, getattr(batches.batch_sampler, "sampler", None), batches.dataset):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def read_epoch(batches: Batches, seed: int, epoch: int, process: int = 0, skipped: int = 0) -> Iterator[Any]:
    """Yield the batches of an epoch, after ``skipped`` ones that are read and passed over.

    Random numbers that reading a batch takes (crops, colours) depend on the epoch and the batch's number alone, so that
    an epoch that goes on in its middle sees the same images. Where reading takes none, those passed over are not read.

    Args:
        batches: Told of the epoch by :func:`start_epoch`.
        seed: Seed of the run.
        epoch: The epoch, from 0.
        process: Number of this process.
        skipped: Batches that are done already.
    """
    if skipped >= len(batches):
        return
    left_out = _leave_out(batches, skipped)
    iterator = iter(batches)
    for number in itertools.count(left_out):
        # A loader that starts draws from the epoch's own numbers: seeds of its workers, the order of a shuffle.
        place = nullcontext() if number == left_out else reading_randomness(seed, epoch, number, process)
        try:
            with place:
                batch = next(iterator)
        except StopIteration:
            return
        if number >= skipped:
            yield batch


def _leave_out(batches: Batches, count: int) -> int:
    """Have the order of an epoch begin ``count`` batches later, if that is the same; return how many are left out."""
    sampler, size = getattr(batches.batch_sampler, "sampler", None), getattr(batches.batch_sampler, "batch_size", None)
    if not isinstance(sampler, EpochSampler):
        return 0
    plain = isinstance(as_it_is(batches.dataset), ImageDataset) and isinstance(size, int) and not batches.num_workers
    sampler.start = count * size if plain and isinstance(size, int) else 0
    return count if sampler.start else 0


def _length(data: Dataset[Any], purpose: str) -> int:
    if not isinstance(data, Sized):
        raise DataError(f"the {purpose} data has no length; give a map-style Dataset or a DataLoader")
    if not len(data):
        raise DataError(f"the {purpose} data is empty")
    return len(data)
