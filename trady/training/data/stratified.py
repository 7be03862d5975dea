"""A part of labelled examples that is held out: the same share of every class, by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trady.training.data.datasets import epoch_order


def stratified(
    labels: npt.NDArray[Any], share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the places of the examples that are kept and of those that are held out, each in their order.

    Every class gives its share, rounded down; what is still missing comes from the classes that gave the least of what
    they owe. A class keeps at least one example, so one of a single example gives none.

    Args:
        labels: A class for each example, or any value that can be compared.
        share: Of the examples that is held out; at least one is.
        seed: Decides which.
    """
    count = len(labels)
    _, classes = np.unique(labels, return_inverse=True)
    sizes = np.bincount(classes)
    owed = sizes * share
    given = np.minimum(np.floor(owed).astype(np.int64), np.maximum(sizes - 1, 0))
    wanted = max(1, round(count * share))
    while given.sum() < wanted:
        able = np.where(given < sizes - 1, owed - given, -np.inf)
        if not np.isfinite(able).any():  # classes of a single example each
            able = np.where(given < sizes, owed - given, -np.inf)
        given[int(able.argmax())] += 1
    left, held = given.copy(), np.zeros(count, dtype=bool)
    for at in epoch_order(count, seed, 0).tolist():
        if left[classes[at]]:
            left[classes[at]] -= 1
            held[at] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
