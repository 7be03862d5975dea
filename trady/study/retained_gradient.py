"""RGN against the raw norm: how much gradient the best channels of each keep in the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trady.channels.table import ChannelTable
from trady.policies.fill import fill
from trady.ranking.scores import Floats, Metric, channel_scores
from trady.study.records import Records

#: Budgets of the curve, as shares of the elements of all channels.
BUDGET_SHARES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.45, 0.65, 1.0)


@dataclass(frozen=True)
class Kept:
    """What fits in one budget, on one data set, with the mean gradient of all its runs.

    Attributes:
        dataset: Its name.
        elements: B_mem: C^W + C^A summed over the channels, one sample.
        share: The same, over that of all channels.
        rgn: Share of the squared gradient norm that the channels of highest RGN_c keep.
        norm: Share that the channels of highest norm keep.
        random: Share that channels drawn uniformly keep, the mean over ten draws.
        rgn_channels: Number of channels by RGN.
        norm_channels: Number of channels by norm.
    """

    dataset: str
    elements: int
    share: float
    rgn: float
    norm: float
    random: float
    rgn_channels: int
    norm_channels: int


def kept(records: Records) -> tuple[Kept, ...]:
    """Fill each budget by RGN, by norm and at random: as policies do, each channel that still fits is taken."""
    found = []
    total = records.table.all_elements
    for dataset in records.datasets:
        squared = records.mean(records.of(dataset))
        for share in BUDGET_SHARES:
            elements = round(share * total)
            by_rgn, rgn_channels = best(records.table, squared, "rgn", elements)
            by_norm, norm_channels = best(records.table, squared, "norm", elements)
            drawn = at_random(records.table, squared, elements, range(10))
            found.append(Kept(dataset, elements, elements / total, by_rgn, by_norm, drawn, rgn_channels, norm_channels))
    return tuple(found)


def best(table: ChannelTable, squared: Mapping[str, Floats], metric: Metric, elements: int) -> tuple[float, int]:
    """Share of the squared norm that the highest-scored channels keep in a budget, and how many they are."""
    scores = np.concatenate([channel_scores(squared[layer.name], layer, metric) for layer in table])
    return _filled(table, squared, np.argsort(-scores, kind="stable"), elements)


def at_random(table: ChannelTable, squared: Mapping[str, Floats], elements: int, seeds: Sequence[int]) -> float:
    """Mean share of the squared norm that uniformly drawn channels keep in a budget."""
    count = table.channel_count
    orders = [np.random.default_rng(seed).permutation(count) for seed in seeds]
    return float(np.mean([_filled(table, squared, order, elements)[0] for order in orders]))


def _filled(
    table: ChannelTable, squared: Mapping[str, Floats], order: np.ndarray[tuple[int], np.dtype[np.int64]], elements: int
) -> tuple[float, int]:
    norms = np.concatenate([squared[layer.name] for layer in table])
    layer_of = np.repeat(np.arange(len(table)), [layer.channels for layer in table])
    costs = np.array([layer.elements for layer in table], dtype=np.int64)
    taken = order[fill(layer_of[order], costs, elements)]
    total = float(norms.sum())
    return (float(norms[taken].sum()) / total if total else 0.0), len(taken)
