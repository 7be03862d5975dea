"""Observation 1: stochastic gradients are heavy-tailed, and few channels carry them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trady.study.estimate import Estimate, bootstrap_mean
from trady.study.noise import EXCEEDANCES, LayerNoise
from trady.study.power_laws import Comparison, PowerLaw
from trady.study.records import Records
from trady.study.tails import top_share

#: Shares of the channels whose share of the gradient is stated.
TOP_SHARES = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class LayerTail:
    """Tails of one layer in one epoch of one run: see :class:`trady.study.noise.LayerNoise`."""

    dataset: str
    seed: int
    epoch: int
    layer: str
    values: int
    zeros: float
    stable: Estimate | None
    gaussian: Estimate | None
    hill: Estimate | None
    power_law: PowerLaw | None


@dataclass(frozen=True)
class EpochTails:
    """Tails over all layers of one data set in one epoch.

    Attributes:
        dataset: Its name.
        epoch: From 0; the noise is that at the weights it begins with.
        stable: Mean over layers and seeds of the stable index.
        gaussian: The same for Gaussian noise with each coordinate's own scale.
        below_two: Share of layers (over all seeds) whose interval lies entirely below 2.
        below_gaussian: Share of layers whose interval lies entirely below that of the Gaussian control.
        hill: Mean over layers and seeds of Hill's index.
        better_than_exponential: Share of layers where a power law fits the tail better than an exponential one.
        worse_than_exponential: Share of layers where an exponential fits better.
        worse_than_lognormal: Share of layers where a log-normal fits better than a power law.
    """

    dataset: str
    epoch: int
    stable: Estimate | None
    gaussian: Estimate | None
    below_two: float
    below_gaussian: float
    hill: Estimate | None
    better_than_exponential: float
    worse_than_exponential: float
    worse_than_lognormal: float


@dataclass(frozen=True)
class TopShare:
    """How much of the squared gradient norm the largest channels carry.

    Attributes:
        dataset: Its name.
        epoch: From 0.
        channels: Share of all channels of the model.
        carried: Share of the squared gradient norm; mean over steps and seeds.
    """

    dataset: str
    epoch: int
    channels: float
    carried: Estimate


@dataclass(frozen=True)
class TailCurve:
    """How much of the noise exceeds how many medians.

    Attributes:
        dataset: Its name; all epochs and seeds.
        exceeding: Shares of the values, falling.
        medians: What they exceed, in medians of the layer's absolute noise: the median over layers, epochs and seeds.
    """

    dataset: str
    exceeding: tuple[float, ...]
    medians: tuple[float, ...]


@dataclass(frozen=True)
class HeavyTails:
    """All statistics of heavy tails."""

    layers: tuple[LayerTail, ...]
    epochs: tuple[EpochTails, ...]
    curves: tuple[TailCurve, ...]
    top_shares: tuple[TopShare, ...]


def heavy_tails(records: Records) -> HeavyTails:
    """Summarise the tails; the interval of a mean over layers resamples layers, that of a top share steps."""
    layers = tuple(
        LayerTail(unit.dataset, unit.seed, unit.epoch, noise.layer, noise.values, noise.zeros, noise.stable,
                  noise.gaussian, noise.hill, noise.power_law)
        for unit in records.units
        for noise in records.noise[unit]
    )  # fmt: skip
    epochs, shares = [], []
    for dataset in records.datasets:
        for epoch in range(records.settings.epochs):
            units = records.of(dataset, epoch=epoch)
            epochs.append(_epoch(dataset, epoch, [noise for unit in units for noise in records.noise[unit]]))
            norms = np.concatenate([records.steps(units, layer.name) for layer in records.table], axis=1)
            for share in TOP_SHARES:
                carried = bootstrap_mean([top_share(step, share) for step in norms])
                shares.append(TopShare(dataset, epoch, share, carried))
    curves = tuple(_curve(records, dataset) for dataset in records.datasets)
    return HeavyTails(layers, tuple(epochs), curves, tuple(shares))


def _curve(records: Records, dataset: str) -> TailCurve:
    given = [noise.quantiles for unit in records.of(dataset) for noise in records.noise[unit] if noise.quantiles]
    # As far out as half of the layers have values.
    length = int(np.median([len(quantiles) for quantiles in given])) if given else 0
    columns = [[quantiles[at] for quantiles in given if len(quantiles) > at] for at in range(length)]
    return TailCurve(dataset, EXCEEDANCES[:length], tuple(float(np.median(column)) for column in columns))


def _epoch(dataset: str, epoch: int, layers: Sequence[LayerNoise]) -> EpochTails:
    pairs = [(layer.stable, layer.gaussian) for layer in layers if layer.stable and layer.gaussian]
    laws = [layer.power_law for layer in layers if layer.power_law is not None]
    exponential = [law.against_exponential for law in laws]
    return EpochTails(
        dataset=dataset,
        epoch=epoch,
        stable=_mean([stable for stable, _ in pairs]),
        gaussian=_mean([gaussian for _, gaussian in pairs]),
        below_two=_share(stable.high < 2 for stable, _ in pairs),
        below_gaussian=_share(stable.high < gaussian.low for stable, gaussian in pairs),
        hill=_mean([layer.hill for layer in layers if layer.hill is not None]),
        better_than_exponential=_verdicts(exponential, 1),
        worse_than_exponential=_verdicts(exponential, -1),
        worse_than_lognormal=_verdicts([law.against_lognormal for law in laws], -1),
    )


def _mean(estimates: Sequence[Estimate]) -> Estimate | None:
    return bootstrap_mean([estimate.value for estimate in estimates]) if estimates else None


def _verdicts(comparisons: Sequence[Comparison], wanted: int) -> float:
    return _share(comparison.verdict == wanted for comparison in comparisons)


def _share(claims: Iterable[bool]) -> float:
    values = list(claims)
    return float(np.mean(values)) if values else 0.0
