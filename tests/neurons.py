"""Policies that select output channels (neurons)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.policies import Draw
from trady.policies.output_channels import fill_output_channels, unit_count


def picked(channels: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> Selection:
    """A selection of lists of channels, as a user's policy may return it."""
    return Selection(channels, outputs or {})


class Neurons:
    """Random neurons until the budget is full, anew in each epoch; of ``share`` of the units at most."""

    name = "neurons"
    uses_ranking = False

    def __init__(self, share: float = 0.4, rectangle: bool = False) -> None:
        self.share, self.rectangle = share, rectangle

    def select(self, draw: Draw) -> Selection:
        random = np.random.default_rng([draw.seed, draw.epoch])
        layers = draw.table.layers
        counts = [unit_count(layer) for layer in layers]
        starts = np.cumsum([0, *counts[:-1]])
        kept = [
            start + random.permutation(count)[: max(1, round(self.share * count))]
            for start, count in zip(starts, counts, strict=True)
        ]
        selection = fill_output_channels(draw, layers, random.permutation(np.concatenate(kept)))
        if not self.rectangle:
            return selection
        fewer = {n: c if len(c) < 2 else random.permutation(c)[: len(c) // 2] for n, c in selection.items()}
        return Selection(fewer, selection.outputs)


class Fixed:
    """The selections it is given, one an epoch."""

    name = "fixed"
    uses_ranking = False

    def __init__(self, *selections: Callable[[ChannelTable], Selection]) -> None:
        self.selections = selections

    def select(self, draw: Draw) -> Selection:
        return self.selections[draw.epoch % len(self.selections)](draw.table)
