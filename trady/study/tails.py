"""How heavy a tail is: the index of an alpha-stable law, Hill's estimator, the share of the largest values."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from trady.study.estimate import Estimate, Floats, bootstrap_mean

#: Share of the largest absolute values that counts as the tail, for Hill's estimator and the fits of power laws.
TAIL_SHARE = 0.05

#: Minimum number of samples, and of values in a tail, for an estimate of an index.
FEWEST_SAMPLES, FEWEST_IN_TAIL = 160, 10

#: Longest block of the stable estimator, and in how many ways samples are cut into blocks.
LONGEST_BLOCK, PARTITIONS = 32, 16

#: Maximum number of groups of samples that the bootstrap resamples.
MOST_GROUPS = 100


def stable_index(samples: npt.ArrayLike, *, seed: int = 0) -> Estimate | None:
    r"""Tail index of a symmetric alpha-stable law: 2 is Gaussian, less is heavier.

    For centred, independent samples :math:`X_1 … X_K` with :math:`K = K_1 K_2` and the sums
    :math:`Y_i = \sum_{j=1}^{K_1} X_{(i-1) K_1 + j}` of blocks,

    .. math:: \frac{1}{\hat\alpha} = \frac{1}{\log K_1}
        \left( \frac{1}{K_2} \sum_i \log |Y_i| - \frac{1}{K} \sum_i \log |X_i| \right)

    (Mohammadi, Mohammadpour and Ogata 2015, "On estimating the tail index and the spectral measure of
    multivariate alpha-stable distributions", corollary 2.4; as used for gradient noise by Simsekli, Sagun and
    Gurbuzbalaban 2019, arXiv 1901.06053).

    Which samples share a block is arbitrary, so the samples are shuffled and the mean over
    :data:`PARTITIONS` ways of cutting them is taken; of a single cut's variance that takes away a third at
    alpha = 1.2 and five sixths at 2.
    Blocks have :math:`K_1 = \sqrt{K} / 2` samples, between 4 and :data:`LONGEST_BLOCK`: longer ones say more
    of the tail and less of the middle where the law is not stable itself, but vary more. The interval
    resamples up to :data:`MOST_GROUPS` groups of samples, each with an estimate of its own.

    Args:
        samples: Any shape. Zeros are left out: a coordinate without noise has no tail. They are not centred here.
        seed: Of the shuffling and resampling.

    Returns:
        The index and its interval, neither cut off at 2; ``None`` for fewer than :data:`FEWEST_SAMPLES` samples
        that are not zero.
    """
    values = _usable(samples)
    count = len(values)
    if count < FEWEST_SAMPLES:
        return None
    block = min(LONGEST_BLOCK, max(4, math.isqrt(count) // 2))
    generator = np.random.default_rng(seed)
    groups = min(MOST_GROUPS, count // (2 * block))
    length = count // groups // block * block
    cut = generator.permutation(values)[: groups * length].reshape(groups, length)
    logs_of_sums = np.zeros(groups)
    for _ in range(PARTITIONS):
        cut = generator.permuted(cut, axis=1)
        sums = np.abs(cut.reshape(groups, -1, block).sum(2))
        logs_of_sums += np.log(np.maximum(sums, np.finfo(np.float64).tiny)).mean(1) / PARTITIONS
    inverse = (logs_of_sums - np.log(np.abs(cut)).mean(1)) / math.log(block)
    if inverse.mean() <= 0:
        return None  # blocks cancel, so the samples are not independent
    # At or below zero, an end of the interval would mean an unbounded index.
    return bootstrap_mean(
        inverse, seed=seed, transform=lambda mean: 1 / np.maximum(mean, 1e-3), samples=groups * length
    )


def hill(samples: npt.ArrayLike, *, share: float = TAIL_SHARE, seed: int = 0) -> Estimate | None:
    r"""Hill's tail index: the exponent of a power law fitted to the largest absolute values.

    .. math:: \frac{1}{\hat\alpha} = \frac{1}{k} \sum_{i=1}^{k} \log \frac{|X|_{(i)}}{|X|_{(k+1)}}

    over the ``k`` largest (Hill 1975, "A simple general approach to inference about the tail of a
    distribution"). For a Gaussian it has no limit and grows as the share falls. The interval resamples the
    excesses :math:`\log |X|_{(i)} / |X|_{(k+1)}`.

    Args:
        samples: Any shape; zeros are left out.
        share: Share of the samples that counts as the tail.
        seed: Of the resampling.

    Returns:
        The index, or ``None`` where the tail has fewer than :data:`FEWEST_IN_TAIL` values or no spread.
    """
    values = np.sort(np.abs(_usable(samples)))
    count = int(share * len(values))
    if count < FEWEST_IN_TAIL:
        return None
    excesses = np.log(values[-count:] / values[-count - 1])
    if excesses.mean() <= 0:
        return None
    return bootstrap_mean(excesses, seed=seed, transform=lambda mean: 1 / np.maximum(mean, 1e-12))


def top_share(squared_norms: npt.ArrayLike, share: float) -> float:
    """Share of the squared gradient norm that the largest channels carry.

    Args:
        squared_norms: ‖∂L/∂W[:, c]‖₂² of every channel, ``[channels]``.
        share: Share of the channels, above 0 and at most 1; at least one channel counts.

    Returns:
        0 to 1; equal channels carry about ``share``. Where all norms are zero, ``share``.
    """
    values = np.sort(np.asarray(squared_norms, dtype=np.float64))[::-1]
    total = float(values.sum())
    if not total:
        return share
    # The share as it was typed, not its floating-point neighbour: a tenth of 30 channels is 3.
    count = max(1, math.ceil(round(share * len(values), 9)))
    return float(values[:count].sum()) / total


def _usable(samples: npt.ArrayLike) -> Floats:
    values = np.asarray(samples, dtype=np.float64).ravel()
    kept: Floats = values[np.isfinite(values) & (values != 0)]
    return kept
