"""Gradient noise at fixed weights: the gradient of a batch less the mean gradient of several.

Its tail index is estimated over the coordinates of a layer, as Simsekli, Sagun and Gurbuzbalaban 2019
(arXiv 1901.06053) do. Coordinates of different scale make such a pool look heavy-tailed even where every one of
them is Gaussian, so each index has a control beside it: Gaussian noise with the same standard deviation in every
coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trady.channels.selection import Channels
from trady.channels.table import ChannelTable, Layer
from trady.study.estimate import Estimate, Floats
from trady.study.power_laws import PowerLaw, fit_power_law
from trady.study.tails import hill, stable_index

#: Maximum number of coordinates of a layer that are used, drawn with the seed.
MOST_COORDINATES = 4096

#: Shares of the noise that exceed the stored quantiles: 1 to 1/10 000, evenly in the logarithm.
EXCEEDANCES: tuple[float, ...] = tuple(10.0 ** (-step / 10) for step in range(41))


@dataclass(frozen=True)
class LayerNoise:
    """The tail of the gradient noise in one layer.

    Attributes:
        layer: Its name.
        values: Number of noise values: coordinates times batches.
        zeros: Share of them that are zero, and left out of everything below.
        stable: Alpha-stable tail index; ``None`` where there are too few values.
        gaussian: The same index for Gaussian noise with each coordinate's own standard deviation.
        hill: Hill's tail index of the largest 5 %.
        power_law: Power law fitted to the largest 5 %, against its rivals.
        quantiles: Absolute noise over its median that the shares :data:`EXCEEDANCES` exceed.
    """

    layer: str
    values: int
    zeros: float
    stable: Estimate | None
    gaussian: Estimate | None
    hill: Estimate | None
    power_law: PowerLaw | None
    quantiles: tuple[float, ...]


class NoiseSample:
    """Gathers some coordinates of the gradients of several batches.

    Args:
        table: The layers.
        seed: Of the choice of coordinates, the same in every epoch of a run.
    """

    def __init__(self, table: ChannelTable, seed: int) -> None:
        self._table = table
        self._coordinates = {layer.name: _coordinates(layer, seed, at) for at, layer in enumerate(table)}
        self._batches: list[dict[str, Floats]] = []

    def next_batch(self) -> None:
        """Start the next batch."""
        self._batches.append({name: np.zeros(len(drawn)) for name, drawn in self._coordinates.items()})

    def see(self, name: str, channels: Channels, gradient: Tensor) -> None:
        """Keep the coordinates of some channels: ``gradient`` is ``[n, weight elements of a channel]``."""
        drawn, width = self._coordinates[name], gradient.shape[1]
        row = np.searchsorted(channels, drawn // width)
        here = np.flatnonzero((row < len(channels)) & (channels[np.minimum(row, len(channels) - 1)] == drawn // width))
        where = torch.from_numpy(row[here] * width + drawn[here] % width).to(gradient.device)
        self._batches[-1][name][here] = gradient.reshape(-1)[where].double().cpu().numpy()

    def tails(self, seed: int) -> list[LayerNoise]:
        """Estimate the tail of each layer's noise."""
        return [
            layer_noise(layer.name, np.stack([batch[layer.name] for batch in self._batches]), seed)
            for layer in self._table
        ]


def layer_noise(layer: str, gradients: Floats, seed: int) -> LayerNoise:
    """Describe the noise in ``gradients``, ``[batches, coordinates]``, of one layer at fixed weights."""
    noise = gradients - gradients.mean(0)
    noise[:, ~gradients.any(0)] = 0
    scale = noise.std(0, ddof=1)
    likeness = np.random.default_rng([seed, 1]).normal(size=noise.shape) * scale
    likeness -= likeness.mean(0)
    alive = np.abs(noise[noise != 0])
    return LayerNoise(
        layer=layer,
        values=noise.size,
        zeros=1 - len(alive) / max(noise.size, 1),
        stable=stable_index(noise, seed=seed),
        gaussian=stable_index(likeness, seed=seed),
        hill=hill(noise, seed=seed),
        power_law=fit_power_law(noise, seed=seed),
        quantiles=_quantiles(alive),
    )


def _quantiles(values: Floats) -> tuple[float, ...]:
    if not len(values):
        return ()
    # No quantile beyond the largest value.
    seen: Sequence[float] = [share for share in EXCEEDANCES if share * len(values) >= 1]
    return tuple((np.quantile(values, [1 - share for share in seen]) / np.median(values)).tolist())


def _coordinates(layer: Layer, seed: int, position: int) -> Channels:
    """Draw coordinates: channel times elements of a channel, plus the place in it; sorted."""
    count = layer.channels * layer.weight_elements
    if count <= MOST_COORDINATES:
        return np.arange(count)
    generator = np.random.default_rng([seed, position])
    return np.sort(generator.choice(count, MOST_COORDINATES, replace=False))
