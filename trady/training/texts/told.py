"""What was read, in words for people: rows, classes and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trady.training.texts.columns import Columns
from trady.training.texts.dataset import Integers
from trady.training.texts.description import Overflow
from trady.training.texts.labels import Labels
from trady.training.texts.tables import Table
from trady.training.texts.tokens import Encoded

#: Classes that are named in a line.
_SHOWN = 6


def told_of_rows(tables: tuple[Table, Table], held: bool) -> str:
    """Say how many rows there are, and which are kept to evaluate on."""
    train, evaluation = tables
    if held:
        return f"{train.name}: {len(train)} rows to train on, {len(evaluation)} kept to evaluate on"
    apart = Path(evaluation.name).name
    return f"{len(train)} rows of {train.name} to train on, {len(evaluation)} of {apart} to evaluate on"


def told_of_labels(labels: Labels, train: Labels, columns: Columns) -> str:
    """Say which classes there are, with the rows of each, or between what the numbers lie."""
    if labels.task == "regression":
        return f"numbers from {train.values.min():g} to {train.values.max():g} in {columns.labels[0]}"
    if labels.task == "multi-label":
        counts = dict(enumerate(train.values.sum(0).astype(int).tolist()))
        kind, where = "labels", "" if len(columns.labels) > 1 else f" in {columns.labels[0]}"
    else:
        counts = Counter(train.values.tolist())
        kind, where = "classes", f" in {columns.labels[0]}"
    shown = ", ".join(f"{name} ({counts.get(at, 0)})" for at, name in enumerate(labels.classes[:_SHOWN]))
    return f"{len(labels.classes)} {kind}{where}: {shown}{', …' * (len(labels.classes) > _SHOWN)}"


def told_of_lengths(encoded: Sequence[Encoded], longest: int | None, overflow: Overflow) -> str:
    """Say how long the texts are, and how many are cut."""
    sizes = np.concatenate([each.lengths for each in encoded])
    return told_of_sizes(sizes, longest, sum(each.cut for each in encoded), overflow)


def told_of_sizes(sizes: Integers, longest: int | None, cut: int, overflow: Overflow) -> str:
    """Say how long sequences are, and how many are cut."""
    told = f"{int(np.median(sizes))} tokens at the median, {int(sizes.max())} at most"
    if longest is None:
        return f"{told}; the model takes any number"
    if not cut:
        return f"{told}; up to {longest} are taken"
    what = "is cut into parts" if overflow == "split" else "is cut off"
    return f"{told}; what exceeds {longest} {what}: {cut} text{'s' * (cut > 1)}"
