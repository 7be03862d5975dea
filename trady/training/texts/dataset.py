"""Texts as token ids, in batches of like length.

Shapes: N examples, B of a batch, T tokens of the longest in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trady.training.data.datasets import EpochSampler, epoch_order, epoch_seed
from trady.training.objective import Objective
from trady.training.rates import Kind
from trady.training.texts.description import TextsDescription

Integers = npt.NDArray[np.int64]

#: Widths of batches are multiples of this: few shapes for a plan, a compiler or a processor's vectors to meet.
WIDTH = 8

#: A label that no loss is computed of.
NO_LOSS = -100

#: Batches of an order that are sorted by length together.
_POOL = 50

IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"


@dataclass(frozen=True)
class Ragged:
    """Rows of numbers of different lengths, one after the other.

    Attributes:
        flat: All numbers.
        starts: ``[N + 1]``: where each row begins, and where the last one ends.
    """

    flat: npt.NDArray[np.int32]
    starts: Integers

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Put rows together."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        flat = np.fromiter((number for row in rows for number in row), dtype=np.int32, count=int(starts[-1]))
        return cls(flat, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.flat[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> Integers:
        """The length of each row."""
        return np.diff(self.starts)

    def take(self, index: Integers) -> Ragged:
        """Return the rows at ``index``."""
        return Ragged.of([self[int(at)].tolist() for at in index])


Labels = npt.NDArray[Any] | Ragged


@dataclass(frozen=True)
class TextDataset(Dataset[dict[str, Any]]):
    """Texts and their labels.

    Attributes:
        columns: What the model is given, by name: ``input_ids``, and ``token_type_ids`` where the tokenizer has them.
        padding: What each of them is filled up with.
        labels: A class number each; a number; ``[N, labels]`` of 0 and 1; or a token to be predicted at each place.
        rows: Of each example, the number of the text that it is of, or is a part of.
        longest: Tokens that an example may have.
        objective: What a model is asked for.
        description: How the texts were read.
        tokenizer: Of the model.
        classes: Names of the classes, in the order of the labels.
        packed: Whether all examples are equally long, and full: no mask is needed.
    """

    columns: Mapping[str, Ragged]
    padding: Mapping[str, int]
    labels: Labels
    rows: Integers
    longest: int
    objective: Objective
    description: TextsDescription
    tokenizer: Any
    classes: tuple[str, ...] = ()
    packed: bool = False

    def __len__(self) -> int:
        return len(self.columns[IDS])

    @property
    def kind(self) -> Kind:
        """What a model reads."""
        return "texts"

    @property
    def lengths(self) -> Integers:
        """Tokens of each example."""
        return self.columns[IDS].lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {name: column[index] for name, column in self.columns.items()}
        found[LABELS] = self.labels[index]
        return found

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return examples as a batch: ``[B, T]`` each, T a multiple of 8, with a mask of what is no padding.

        ``attention_mask`` is left out where nothing is ever padded.
        """
        lengths = [len(example[IDS]) for example in examples]
        width = max(lengths)
        if not self.packed:
            width = min(-(-width // WIDTH) * WIDTH, max(self.longest, width))
        batch = {
            name: torch.from_numpy(_padded([example[name] for example in examples], width, self.padding[name]))
            for name in self.columns
        }
        if not self.packed:
            places = np.arange(width)[None, :] < np.asarray(lengths)[:, None]
            batch[MASK] = torch.from_numpy(places.astype(np.int64))
        labels = [example[LABELS] for example in examples]
        if isinstance(self.labels, Ragged):
            batch[LABELS] = torch.from_numpy(_padded(labels, width, NO_LOSS))
        else:
            batch[LABELS] = torch.from_numpy(np.asarray(labels, dtype=self.labels.dtype))
        return batch

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the examples at ``indices`` as a batch."""
        return self.collate([self[int(index)] for index in indices])

    def largest(self, size: int) -> dict[str, Tensor]:
        """Return a batch as large as any: with the longest example, and padding if any batch has some."""
        order = np.argsort(-self.lengths, kind="stable")
        chosen = order[:size].tolist()
        if len(chosen) > 1:  # a model may make more of a mask with padding than of one without
            chosen[-1] = int(order[-1])
        return self.batch(chosen)

    def take(self, index: Integers) -> TextDataset:
        """Return the examples at ``index``."""
        labels = self.labels.take(index) if isinstance(self.labels, Ragged) else self.labels[index]
        columns = {name: column.take(index) for name, column in self.columns.items()}
        return replace(self, columns=columns, labels=labels, rows=self.rows[index])

    def with_objective(self, objective: Objective) -> TextDataset:
        """Return the same examples with another objective."""
        return replace(self, objective=objective)

    def by_length(self) -> TextDataset:
        """Return the examples by length, the longest first and equals in their order: the order of an evaluation."""
        return self.take(np.argsort(-self.lengths, kind="stable"))


class LengthSampler(EpochSampler):
    """Every example once, in batches of like length, in another order in each epoch.

    It is a pure function of (seed, epoch). The batch with the longest example comes first, so that the first step of an
    epoch, which is measured, is the largest.

    Args:
        lengths: Of the examples.
        batch_size: Examples of a batch.
        seed: Seed of the run.
    """

    def __init__(self, lengths: Integers, batch_size: int, seed: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.length, self.seed, self.epoch).numpy()
        pool, size = self.batch_size * _POOL, self.batch_size
        pools = (order[start : start + pool] for start in range(0, len(order), pool))
        batches = [
            sorted_[start : start + size]
            for each in pools
            for sorted_ in [each[np.argsort(-self.lengths[each], kind="stable")]]
            for start in range(0, len(each), size)
        ]
        whole = [batch for batch in batches if len(batch) == size]
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch, "batches"))
        shuffled = [whole[at] for at in torch.randperm(len(whole), generator=generator).tolist()]
        if shuffled:
            first = max(range(len(shuffled)), key=lambda at: int(self.lengths[shuffled[at]].max()))
            shuffled.insert(0, shuffled.pop(first))
        rest = [batch for batch in batches if len(batch) != size]  # one at most, of the last pool
        return iter(np.concatenate([*shuffled, *rest]).tolist()[self.start :])


def _padded(rows: Sequence[npt.NDArray[np.int32]], width: int, filling: int) -> Integers:
    found = np.full((len(rows), width), filling, dtype=np.int64)
    for at, row in enumerate(rows):
        found[at, : len(row)] = row
    return found
