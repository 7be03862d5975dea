"""Batches that are looked at before they are trained on, of which none is taken away."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, cast

from torch.utils.data import IterableDataset

from trady.model.python_state import reading_state
from trady.training.batch import readable
from trady.training.data.loaders import Batches
from trady.training.randomness import own_randomness
from trady.training.texts.dataset import TextDataset


def to_be_looked_at(batches: Batches) -> Batches:
    """Return batches that :func:`first_of` may look at: data without indices is maybe there once only."""
    return cast("Batches", _ReadAhead(batches)) if isinstance(batches.dataset, IterableDataset) else batches


def first_of(batches: Batches, count: int) -> Generator[Any, None, None]:
    """Return the first batches of a loader, one at a time.

    Those of data without indices come again when the loader is iterated over; they are kept until then. Else the
    generators of samplers, collators and data are put back.
    """
    if isinstance(batches, _ReadAhead):
        yield from batches.look(count)
        return
    with put_back_after(batches):
        yield from islice(batches, count)


def largest_of(batches: Batches) -> Any:
    """Return the largest batch of a loader, as far as that can be known: of texts with the longest, else the first."""
    data, size = batches.dataset, batches.batch_size
    if isinstance(data, TextDataset) and size is not None:
        return data.largest(size)
    with closing(first_of(batches, 1)) as first:
        return next(readable(first))


@contextmanager
def put_back_after(batches: Batches) -> Iterator[None]:
    """Context after which what samplers, collators and data have drawn is put back."""
    samplers = [batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None)]
    data = [batches.dataset, getattr(batches.dataset, "dataset", None)]  # that of a Subset
    state = reading_state([batches.collate_fn, batches.generator, *data, *samplers])
    with own_randomness():
        try:
            yield
        finally:
            state.restore()


class _ReadAhead:
    """A loader whose first batches may be looked at before it is iterated over."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._ahead: deque[Any] = deque()
        self._open: Iterator[Any] | None = None

    def look(self, count: int) -> Iterator[Any]:
        """Return the first batches of the next iteration."""
        if self._open is None:
            self._open = iter(self._batches)
        self._ahead.extend(islice(self._open, max(0, count - len(self._ahead))))
        yield from islice(list(self._ahead), count)

    def set_epoch(self, epoch: int) -> None:
        """Begin again where the data has an order for each epoch; the loop tells the data itself."""
        if hasattr(self._batches.dataset, "set_epoch"):
            self._ahead.clear()
            self._open = None

    def __iter__(self) -> Iterator[Any]:
        ahead, self._ahead = self._ahead, deque()
        rest, self._open = self._open, None
        if rest is None:
            rest = iter(self._batches)
        while ahead:
            yield ahead.popleft()
        yield from rest

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
