"""Scores of layers and channels: RGN, norms, top-K layers, rank correlation.

The paper (arXiv 2510.19675) scores a channel by its reweighted gradient norm, equation 7, and a layer by the sum over
its channels, equation 8:

    RGN_c = ‖∂L/∂W[:, c]‖₂ / (C^W_c + C^A_c)        layer RGN = Σ_c RGN_c

W[:, c] are the weights that read input channel c, C^W_c is their number, and C^A_c the number of elements of the
channel's activation for one sample. Of several stochastic gradients, ‖∂L/∂W[:, c]‖₂ is the root of the mean square.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from trady.channels.table import Layer
from trady.errors import RankingError

Metric = Literal["rgn", "norm"]

Floats = npt.NDArray[np.float64]


def layer_rgn(squared_norms: npt.ArrayLike, layer: Layer) -> float:
    """Layer RGN, equation 8 of arXiv 2510.19675: Σ_c ‖∂L/∂W[:, c]‖₂ / (C^W_c + C^A_c).

    Args:
        squared_norms: ‖∂L/∂W[:, c]‖₂² of every input channel, ``[layer.channels]``.
        layer: Gives the cost of its channels.

    Raises:
        RankingError: When there is not one norm for each channel.
    """
    return layer_score(squared_norms, layer, "rgn")


def channel_rgn(squared_norms: npt.ArrayLike, layer: Layer) -> Floats:
    """RGN_c of every input channel, equation 7 of arXiv 2510.19675: ‖∂L/∂W[:, c]‖₂ / (C^W_c + C^A_c).

    Args and errors are those of :func:`layer_rgn`; the result is ``[layer.channels]``.
    """
    return channel_scores(squared_norms, layer, "rgn")


def layer_score(squared_norms: npt.ArrayLike, layer: Layer, metric: Metric) -> float:
    """Sum of the channels' scores: equation 8 for ``rgn``, the same without the cost for ``norm``."""
    return float(channel_scores(squared_norms, layer, metric).sum())


def channel_scores(squared_norms: npt.ArrayLike, layer: Layer, metric: Metric) -> Floats:
    """‖∂L/∂W[:, c]‖₂ of each channel for ``norm``; divided by its cost for ``rgn``."""
    norms = np.sqrt(_norms_of(squared_norms, layer))
    return norms / layer.elements if metric == "rgn" else norms


def top_layers(scores: Mapping[str, float], share: float = 0.97) -> tuple[str, ...]:
    """The fewest layers, highest score first, whose cumulated score reaches the share.

    Equal scores keep their order in ``scores``. When all scores are zero no layer is better
    than another, and all are returned.

    Args:
        scores: Score of each layer, finite and not negative.
        share: Share of the sum of scores, above 0 and at most 1; the paper takes 0.97.

    Raises:
        RankingError: When the share is out of range.
    """
    if not 0 < share <= 1:
        raise RankingError(f"share {share} is not above 0 and at most 1; the paper takes 0.97")
    order = tuple(sorted(scores, key=lambda name: -scores[name]))
    # Exact sums of what the user typed: in floating point, 7 of 100 equal layers are not 0.07 of them.
    missing = Fraction(repr(float(share))) * sum(map(Fraction, scores.values()))
    if missing == 0:
        return order
    for count, name in enumerate(order, start=1):
        missing -= Fraction(scores[name])
        if missing <= 0:
            return order[:count]
    raise AssertionError("unreachable: a share of at most 1 is reached by all layers")


def spearman(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Spearman's rank correlation, -1 to 1, with mean ranks for ties.

    Where it is undefined because one side has a single rank, it is 1 if both have and 0 if not.

    Args:
        left: Values, ``[n]``.
        right: Values of the same things, ``[n]``.
    """
    a, b = _ranks(np.asarray(left, dtype=np.float64)), _ranks(np.asarray(right, dtype=np.float64))
    if np.array_equal(a, b):
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale else 0.0


def _norms_of(squared_norms: npt.ArrayLike, layer: Layer) -> Floats:
    values = np.asarray(squared_norms, dtype=np.float64)
    if values.shape != (layer.channels,):
        raise RankingError(
            f"squared norms of shape {values.shape} for layer {layer.name!r}; it has {layer.channels} channels"
        )
    return values


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, the mean of their places for equal values."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = np.cumsum(count) - (count - 1) / 2
    return ranks[place]
