"""Which samples make the largest batch, as far as the lengths of what they have tell.

A collator pads, concatenates or packs: each size of a batch is a maximum or a sum, over its samples, of the lengths of
some columns together (a prompt and its completion). So for all single columns, all pairs and all columns together the
longest sample is in one batch; what is padded is as large there as it can become. For what is concatenated there are
the batches of the samples with the most in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

#: Samples that are looked at for their lengths where no column tells, in batches; the same number of batches is
#: collated of the longest texts, whose tokens no one has counted.
BATCHES = 8

#: With more columns than that, pairs of them are not looked at.
_MOST_COLUMNS = 8

#: Rows of a table that are read at once.
_ROWS = 10_000

Lengths = npt.NDArray[np.int64]


def largest_choices(lengths: Lengths, size: int, *, text: bool = False) -> list[list[int]]:
    """Return the samples of batches one of which is as large as any.

    Args:
        lengths: Of each sample's columns [samples, columns].
        size: Samples of a batch.
        text: The lengths are of texts: more tokens may come of fewer characters.
    """
    count, columns = lengths.shape
    whole = lengths.sum(1)
    subsets = [list(each) for number in (1, 2) for each in combinations(range(columns), number)]
    if columns > _MOST_COLUMNS:
        subsets = subsets[:columns]
    sums = [whole, *(lengths[:, subset].sum(1) for subset in subsets)]
    longest = list(dict.fromkeys(int(each.argmax()) for each in sums))
    by_sum = np.argsort(-whole, kind="stable").tolist()
    # The shortest one too: then there is padding, and a mask of it that a model may make more of than of none.
    shortest = [by_sum[-1]] if len(longest) < size else []
    padded = list(dict.fromkeys([*longest, *shortest, *by_sum]))[:size]
    most = [np.argsort(-each, kind="stable")[:size].tolist() for each in sums]
    texts = [by_sum[start : start + size] for start in range(size, min(count, BATCHES * size), size)] if text else []
    found: list[list[int]] = []
    for choice in (padded, *most, *texts):
        if sorted(choice) not in [sorted(other) for other in found]:
            found.append(choice)
    return found


def lengths_of(data: Any, at_most: int) -> tuple[Lengths, bool]:
    """Return the lengths of what each sample has [samples, columns], and whether some of them are of texts.

    Of all samples where that costs no transform, else of the first ``at_most``; empty where samples are no mappings.
    """
    first = data[0] if len(data) else {}
    if not isinstance(first, Mapping):
        return np.zeros((0, 0), np.int64), False
    names = [name for name, value in first.items() if _is_counted(value)]
    if "length" in first:
        names = ["length"]
    text = any(isinstance(first[name], str) for name in names)
    if not names:
        return np.zeros((0, 0), np.int64), False
    is_table = hasattr(data, "with_format") and hasattr(data, "column_names")  # of the datasets library
    if is_table and getattr(data, "format", {}).get("type") != "custom":
        return _of_table(data, names), text
    count = len(data) if isinstance(data, list) else min(len(data), at_most)
    rows = list(_of_samples(data, names, count))
    return np.array(rows, np.int64).reshape(len(rows), len(names)), text


def _of_samples(data: Any, names: Sequence[str], count: int) -> Iterator[list[int]]:
    for index in range(count):
        sample = data[index]
        yield [_length(sample[name]) if name in sample else 0 for name in names]


def _of_table(data: Any, names: Sequence[str]) -> Lengths:
    """Count in Arrow's columns, without making objects of what is in them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for table in data.select_columns(list(names)).with_format("arrow").iter(_ROWS):
        for name in names:
            column = table[name]
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                counted = pc.list_value_length(column)
            elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                counted = pc.utf8_length(column)
            else:
                counted = pa.array([_length(value) for value in column.to_pylist()], pa.int64())
            found[name].append(pc.fill_null(counted, 0).to_numpy())
    return np.stack([np.concatenate(found[name]) for name in names], 1).astype(np.int64)


def _length(value: Any) -> int:
    return value if isinstance(value, int) else _size(value)


def _is_counted(value: Any) -> bool:
    """Whether it is a text, a list or a tensor of one dimension: what is padded with others."""
    return isinstance(value, (str, list, tuple)) or len(getattr(value, "shape", ())) == 1


def _size(value: Any) -> int:
    return len(value) if _is_counted(value) else 0
