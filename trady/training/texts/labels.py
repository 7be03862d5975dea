"""Labels of texts as numbers, and which task they are of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.texts.description import TextTask
from trady.training.texts.tables import Table

#: Classes that a table may have; more are numbers or texts by mistake.
MOST_CLASSES = 10_000

#: With more different whole numbers than that, and more than a half of the rows, they are no classes.
_MOST_NUMBERED = 50

#: Names in a message.
_SHOWN = 5


@dataclass(frozen=True)
class Labels:
    """The labels of a table.

    Attributes:
        task: What they are for.
        values: Class numbers (int64), numbers (float32), or ``[N, labels]`` of 0 and 1 (float32).
        classes: Their names; empty for a regression.
    """

    task: TextTask
    values: npt.NDArray[Any]
    classes: tuple[str, ...]

    def take(self, index: npt.NDArray[np.int64]) -> Labels:
        """Return those at ``index``."""
        return Labels(self.task, self.values[index], self.classes)


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def read_labels(
    table: Table, columns: Sequence[str], task: TextTask | None = None, classes: tuple[str, ...] | None = None
) -> Labels:
    """Read the labels of a table in which none is missing.

    Args:
        table: The table.
        columns: One column of labels, or several of 0 and 1.
        task: What they are for; by what they are, where nobody says it.
        classes: The classes of the training part, which another part must keep to.

    Raises:
        DataError: They are of mixed types, or of classes that the training part lacks.
    """
    if len(columns) > 1:
        return _several_columns(table, columns, task)
    values = table.columns[columns[0]]
    place = f"{table.name}, column {columns[0]}"
    if isinstance(values[0], (list, tuple)):
        return _lists(values, place, task, classes, table.class_names.get(columns[0], ()))
    if columns[0] in table.class_names and task in (None, "classification"):
        return _numbered(values, place, table.class_names[columns[0]], classes)
    found = task or ("classification" if classes is not None else _task_of(values, place))
    if found == "multi-label":
        raise DataError(f"{place} has one label a text; several are a list in a cell, or a column of 0 and 1 each")
    if found == "regression":
        return Labels("regression", np.asarray([_number(value, place) for value in values], np.float32), ())
    return _named([_name(value) for value in values], place, classes)


def _task_of(values: Sequence[Any], place: str) -> TextTask:
    kinds = [_kind(value) for value in values]
    counts = Counter("texts" if kind == "text" else "numbers" for kind in kinds)
    if len(counts) > 1:
        rare = min(counts, key=lambda kind: counts[kind])
        at = next(at for at, kind in enumerate(kinds) if ("texts" if kind == "text" else "numbers") == rare)
        raise DataError(
            f"{place} has labels of mixed types: {counts['numbers']} numbers and {counts['texts']} texts; row {at + 1} "
            f"is {values[at]!r}. Mend them, or take all as names of classes: --task classification"
        )
    if "text" in kinds:
        return "classification"
    if "fraction" in kinds:
        return "regression"
    different = len(set(map(float, values)))
    if different > _MOST_NUMBERED and different > len(values) / 2:
        raise DataError(
            f"{place} has {different} different whole numbers in {len(values)} rows: say whether they are numbers to "
            "predict, --task regression, or names of classes, --task classification"
        )
    return "classification"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "whole"
    if isinstance(value, int):
        return "whole"
    if isinstance(value, float):
        return "whole" if value.is_integer() else "fraction"
    text = str(value).strip()
    if re.fullmatch(r"[-+]?\d+", text):
        return "whole"
    if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", text):
        return "fraction"
    return "text"


def _number(value: Any, place: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{place} holds {value!r}, which is no number; a regression learns numbers") from None
    if not math.isfinite(found):
        raise DataError(f"{place} holds {found}; a regression learns finite numbers")
    return found


def _name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _named(names: Sequence[str], place: str, classes: tuple[str, ...] | None) -> Labels:
    found = sorted(set(names), key=_order)
    if classes is None:
        if len(found) == 1:
            raise DataError(f"{place} has one class only, {found[0]!r}, so there is nothing to tell apart")
        if len(found) > MOST_CLASSES:
            raise DataError(f"{place} has {len(found)} different values; that many are no classes")
        classes = tuple(found)
    if foreign := [name for name in found if name not in classes]:
        shown = ", ".join(foreign[:_SHOWN]) + (", …" if len(foreign) > _SHOWN else "")
        raise DataError(f"{place} has classes that the training part has not: {shown}; there are {', '.join(classes)}")
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels("classification", np.asarray([numbers[name] for name in names], np.int64), classes)


def _order(name: str) -> tuple[int, float, str]:
    """Numbers by size, then names."""
    return (0, float(name), name) if _kind(name) != "text" else (1, 0.0, name)


def _numbered(values: Sequence[Any], place: str, names: tuple[str, ...], classes: tuple[str, ...] | None) -> Labels:
    """Read numbers of classes that the table names; -1 is how such tables say that there is none."""
    found = np.asarray(values, np.int64)
    if found.min() < 0 or found.max() >= len(names):
        wrong = int(found[(found < 0) | (found >= len(names))][0])
        raise DataError(f"{place} has the label {wrong}, and its classes are numbered from 0 to {len(names) - 1}")
    if classes is not None and names != classes:
        return _named([names[number] for number in found], place, classes)
    if classes is None and len(set(found.tolist())) == 1:
        raise DataError(f"{place} has one class only, {names[int(found[0])]!r}, so there is nothing to tell apart")
    return Labels("classification", found, names)


def _several_columns(table: Table, columns: Sequence[str], task: TextTask | None) -> Labels:
    if task not in (None, "multi-label"):
        raise DataError(f"several columns of labels ({', '.join(columns)}) are of --task multi-label, not of {task}")
    found = np.zeros((len(table), len(columns)), np.float32)
    for at, column in enumerate(columns):
        for row, value in enumerate(table.columns[column]):
            text = str(value).strip().lower()
            if text not in ("0", "1", "0.0", "1.0", "true", "false"):
                raise DataError(
                    f"{table.name}, column {column}, row {row + 1} is {value!r}; where each label has a column, it "
                    "holds 0 or 1"
                )
            found[row, at] = text in ("1", "1.0", "true")
    return Labels("multi-label", found, tuple(columns))


def _lists(
    values: Sequence[Any],
    place: str,
    task: TextTask | None,
    classes: tuple[str, ...] | None,
    known: tuple[str, ...],
) -> Labels:
    if task not in (None, "multi-label"):
        raise DataError(f"{place} has a list of labels for a text, which is of --task multi-label, not of {task}")
    if any(not isinstance(value, (list, tuple)) for value in values):
        at = next(at for at, value in enumerate(values) if not isinstance(value, (list, tuple)))
        raise DataError(f"{place} has labels of mixed types: most are lists, and row {at + 1} is {values[at]!r}")
    named = [[known[each] if known and isinstance(each, int) else _name(each) for each in value] for value in values]
    names = classes or known or tuple(sorted({name for value in named for name in value}, key=_order))
    if not names:
        raise DataError(f"{place} has no label at all: every list is empty")
    numbers = {name: number for number, name in enumerate(names)}
    found = np.zeros((len(values), len(names)), np.float32)
    for row, value in enumerate(named):
        for name in value:
            if name not in numbers:
                raise DataError(f"{place} has a label that the training part has not: {name}")
            found[row, numbers[name]] = 1.0
    return Labels("multi-label", found, names)
