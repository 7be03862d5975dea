"""Cuts all channels into selections that each fit in a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from trady.channels.selection import Channels, Selection
from trady.channels.table import ChannelTable, Layer


def cut(table: ChannelTable, fits: Callable[[Selection], bool]) -> Iterator[Selection]:
    """Cut all channels, in order of execution, into selections that fit, each as large as possible.

    A layer of which not one channel fits is left out.
    """
    current: dict[str, Channels] = {}
    for layer in table:
        start = 0
        while start < layer.channels:
            count = _most(layer.channels - start, lambda n: fits(_with(current, layer, start, n)))  # noqa: B023
            if count:
                current = dict(_with(current, layer, start, count).channels)
                start += count
            elif not current:
                break
            if start < layer.channels and current:
                yield Selection(current)
                current = {}
    if current:
        yield Selection(current)


def _with(current: Mapping[str, Channels], layer: Layer, start: int, count: int) -> Selection:
    return Selection({**current, layer.name: np.arange(start, start + count)})


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits, or 0. If a count fits, all smaller ones do."""
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
