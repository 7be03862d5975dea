"""Observation 2: the ranking of layers by RGN hardly changes over epochs, seeds and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from trady.channels.table import ChannelTable
from trady.ranking.scores import Floats, spearman, top_layers
from trady.study.folder import Unit
from trady.study.records import Records

#: Share of the cumulated layer RGN that makes the pool (arXiv 2510.19675).
POOL_SHARE = 0.97


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation of pairs of rankings.

    Attributes:
        between: ``epochs`` of one run, ``seeds`` (other things equal) or ``tasks`` (other things equal).
        pairs: Number of pairs; 0 where the study has only one of the kind, and the rest is ``None`` then.
        mean: Mean over the pairs.
        least: The lowest of them.
    """

    between: str
    pairs: int
    mean: float | None
    least: float | None


@dataclass(frozen=True)
class Pool:
    """The top-K layers of one run, by layer RGN over all its epochs.

    Attributes:
        dataset: Its name.
        seed: Of the run.
        k: Number of layers in it.
        layers: The fewest layers that hold 97 % of the cumulated layer RGN, highest first.
        channels_share: Share of all input channels that these layers have.
    """

    dataset: str
    seed: int
    k: int
    layers: tuple[str, ...]
    channels_share: float


@dataclass(frozen=True)
class Transfer:
    """How well the pool of one task serves another, over all seeds and epochs.

    Attributes:
        measured_on: The task whose pool it is.
        held_on: The task whose gradient it is.
        k: Layers in the pool.
        rgn: Share of the other task's cumulated layer RGN.
        squared_norm: Share of the other task's squared gradient norm.
        overlap: Layers that the pool shares with the other task's own, over the layers of the larger.
    """

    measured_on: str
    held_on: str
    k: int
    rgn: float
    squared_norm: float
    overlap: float


@dataclass(frozen=True)
class Stability:
    """All statistics of stability.

    Attributes:
        units: Names of the rows and columns of ``matrix``.
        matrix: Spearman's correlation of layer RGN between any two epochs of any two runs.
        layers: Of layer RGN, between epochs, seeds and tasks.
        channels: The same of channel norms within a layer (mean over layers with at least 8 channels): what does
            depend on the task.
        layer_rgn: Data set to layer RGN over all seeds and epochs, in order of execution.
        curves: Data set to the cumulated share of layer RGN, highest layer first.
        pools: One a run.
        transfers: Every ordered pair of tasks.
    """

    units: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    layers: tuple[Agreement, ...]
    channels: tuple[Agreement, ...]
    layer_rgn: dict[str, dict[str, float]]
    curves: dict[str, tuple[float, ...]]
    pools: tuple[Pool, ...]
    transfers: tuple[Transfer, ...]


def stability(records: Records) -> Stability:
    """Compare rankings of layers, and of channels within layers, over all that was recorded."""
    rgn = {unit: list(records.layer_rgn([unit]).values()) for unit in records.units}
    means = {unit: records.mean([unit]) for unit in records.units}
    rgn_of = {dataset: records.layer_rgn(records.of(dataset)) for dataset in records.datasets}

    def channels(left: Unit, right: Unit) -> float:
        return channel_agreement(records.table, means[left], means[right])

    return Stability(
        units=tuple(map(str, records.units)),
        matrix=tuple(tuple(spearman(rgn[a], rgn[b]) for b in records.units) for a in records.units),
        layers=_agreements(records.units, lambda a, b: spearman(rgn[a], rgn[b])),
        channels=_agreements(records.units, channels),
        layer_rgn=rgn_of,
        curves={dataset: cumulated(scores.values()) for dataset, scores in rgn_of.items()},
        pools=tuple(_pool(records, dataset, seed) for dataset, seed in records.runs),
        transfers=tuple(
            _transfer(records, rgn_of, here, there) for here in records.datasets for there in records.datasets
            if here != there
        ),
    )  # fmt: skip


def channel_agreement(table: ChannelTable, left: Mapping[str, Floats], right: Mapping[str, Floats]) -> float:
    """Mean over layers of Spearman's correlation between the channel norms of two recordings."""
    found = [spearman(left[layer.name], right[layer.name]) for layer in table if layer.channels >= 8]
    return float(np.mean(found)) if found else 0.0


def cumulated(scores: Iterable[float]) -> tuple[float, ...]:
    """Cumulated share of the scores, highest first."""
    ordered = np.sort(np.array(list(scores)))[::-1]
    return tuple((np.cumsum(ordered) / max(ordered.sum(), np.finfo(np.float64).tiny)).tolist())


def _agreements(units: Sequence[Unit], compare: Callable[[Unit, Unit], float]) -> tuple[Agreement, ...]:
    """Compare the pairs that differ in one thing only."""
    kinds = {"epochs": lambda u: (u.dataset, u.seed), "seeds": lambda u: (u.dataset, u.epoch),
             "tasks": lambda u: (u.seed, u.epoch)}  # fmt: skip
    found = []
    for kind, fixed in kinds.items():
        values = [compare(a, b) for a, b in combinations(units, 2) if fixed(a) == fixed(b)]
        mean, least = (float(np.mean(values)), min(values)) if values else (None, None)
        found.append(Agreement(kind, len(values), mean, least))
    return tuple(found)


def _pool(records: Records, dataset: str, seed: int) -> Pool:
    layers = top_layers(records.layer_rgn(records.of(dataset, seed)), POOL_SHARE)
    channels = sum(records.table[name].channels for name in layers)
    return Pool(dataset, seed, len(layers), layers, channels / records.table.channel_count)


def _transfer(records: Records, rgn_of: Mapping[str, Mapping[str, float]], here: str, there: str) -> Transfer:
    pool, own = top_layers(rgn_of[here], POOL_SHARE), top_layers(rgn_of[there], POOL_SHARE)
    squared = {name: float(values.sum()) for name, values in records.mean(records.of(there)).items()}
    return Transfer(
        measured_on=here,
        held_on=there,
        k=len(pool),
        rgn=_held(rgn_of[there], pool),
        squared_norm=_held(squared, pool),
        overlap=len(set(pool) & set(own)) / max(len(pool), len(own)),
    )


def _held(scores: Mapping[str, float], names: Iterable[str]) -> float:
    return sum(scores[name] for name in names) / max(sum(scores.values()), np.finfo(np.float64).tiny)
