"""The batches that policies are measured on: a few, the same in every epoch and on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, Subset

from trady.training.batch import split_batch
from trady.training.data.augment import as_it_is
from trady.training.data.datasets import epoch_seed
from trady.training.data.loaders import Batches
from trady.training.data.looking import first_of


def measured_on(loader: Batches, count: int, seed: int, device: torch.device) -> Iterable[tuple[Any, Any]]:
    """Return the first ``count`` batches of an order of the training data, one at a time, as (inputs, labels).

    The order is a pure function of the seed and independent of that of training, and images are as they are, without
    augmentation. A data set that cannot be indexed
    (``IterableDataset``) gives the next batches of its loader, which are trained on all the same.

    Args:
        loader: Batches of the training data; its batch size and collation are used.
        count: Number of batches.
        seed: Seed of the run.
        device: Where the batches go.

    """
    return _Observed(
        loader if isinstance(loader.dataset, IterableDataset) else _ordered(loader, count, seed), count, device
    )


class _Observed:
    """Iterates over a loader's first batches, each time from the start."""

    def __init__(self, loader: Batches, count: int, device: torch.device) -> None:
        self._loader, self._count, self._device = loader, count, device

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in first_of(self._loader, self._count):
            yield split_batch(send_to_device(batch, self._device))


def _ordered(loader: Batches, count: int, seed: int) -> Batches:
    data: Any = as_it_is(loader.dataset)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    generator = torch.Generator().manual_seed(epoch_seed(seed, 0, "observed"))
    order = torch.randperm(len(data), generator=generator)[: count * size].tolist()
    return DataLoader(Subset(data, order), batch_size=size, collate_fn=loader.collate_fn)
