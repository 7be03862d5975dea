"""Which rows of a table are trained on, and which are kept to evaluate on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.data.datasets import epoch_order
from trady.training.texts.dataset import Integers
from trady.training.texts.labels import is_missing
from trady.training.texts.tables import Table

#: Of this many rows, one is kept to evaluate on where a source has no part of its own for that.
ONE_OF = 10

#: Rows in a message.
_SHOWN = 5


def complete_rows(table: Table, texts: Sequence[str], labels: Sequence[str]) -> tuple[Table, str | None]:
    """Return the rows that have a text and a label, and a remark on those that are left out.

    Raises:
        DataError: A text is no text, or no row is left.
    """
    kept, left_out = [], []
    needed = (*texts, *labels)
    for row in range(len(table)):
        empty = next((name for name in needed if is_missing(table.columns[name][row])), None)
        if empty is None:
            kept.append(row)
        else:
            left_out.append((row, empty))
        for name in texts:
            value = table.columns[name][row]
            if value is not None and not isinstance(value, (str, int, float)):
                raise DataError(
                    f"{table.name}, column {name}, row {row + 1} is a {type(value).__name__}, not a text; name the "
                    "column of the texts: --text-column"
                )
    if not kept:
        raise DataError(f"{table.name} has no row with {' and '.join(needed)}: all {len(table)} lack one of them")
    if not left_out:
        return table, None
    shown = ", ".join(f"{row + 1} ({name} is empty)" for row, name in left_out[:_SHOWN])
    more = ", …" if len(left_out) > _SHOWN else ""
    plural = "s" * (len(left_out) > 1)
    return table.take(kept), f"left out of {table.name}: {len(left_out)} row{plural}: {shown}{more}"


def limited(table: Table, limit: int | None, seed: int) -> Table:
    """Return up to ``limit`` rows, drawn with the seed, in their order."""
    if limit is None or limit >= len(table):
        return table
    return table.take(np.sort(epoch_order(len(table), seed, 0).numpy()[:limit]).tolist())


def held_out(count: int, keys: npt.NDArray[Any] | None, seed: int, name: str) -> tuple[Integers, Integers]:
    """Return the rows to train on and a tenth to evaluate on, with the labels in both parts alike.

    Args:
        count: Number of rows.
        keys: A class or a number of each, by which they are stratified; ``None`` is not.
        seed: Of the choice.
        name: Of the source.

    Raises:
        DataError: There are fewer than two rows.
    """
    if count < 2:
        raise DataError(f"{name} has {count} row; two are needed at least, to train and to evaluate")
    order = epoch_order(count, seed, 0).numpy()
    if keys is not None:
        order = order[np.argsort(keys[order], kind="stable")]
    places = np.arange(count) % ONE_OF == (ONE_OF // 2 if count >= ONE_OF else count // 2)
    if keys is not None and keys.dtype.kind == "i":  # a class is trained on before it is evaluated
        places &= np.isin(keys[order], keys[order[~places]])
    return np.sort(order[~places]), np.sort(order[places])


def digest(table: Table, names: Sequence[str]) -> str:
    """Return sixteen digits that name the content of some columns."""
    found = hashlib.sha256()
    for name in names:
        found.update(f"{name}\0{len(table)}\0".encode("utf-8", "surrogatepass"))
        for value in table.columns[name]:
            found.update(f"{value}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]
