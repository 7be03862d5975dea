"""A number with its interval, by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Resamples of every bootstrap here.
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """An estimate and its interval.

    Attributes:
        value: The estimate.
        low: Lower end of the 95 % interval.
        high: Upper end.
        samples: Number of observations that it comes from.
    """

    value: float
    low: float
    high: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "samples": self.samples}

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    seed: int = 0,
    transform: Callable[[Any], Any] = lambda mean: mean,
    samples: int | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate a function of a mean, with the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: Independent observations, ``[n]``, at least one.
        seed: Of the resampling.
        transform: Monotone function of the mean, such as ``1 / mean``; it takes a number or an array.
        samples: Number of observations that the estimate states; ``n`` by default.
        confidence: Coverage of the interval.

    Returns:
        ``transform(mean)`` and the transformed quantiles of the resampled means. The interval of a single value is
        the value.
    """
    given = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    count = len(given)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    means = weights @ given
    outside = (1 - confidence) / 2
    ends = sorted(float(transform(end)) for end in np.quantile(means, [outside, 1 - outside]))
    return Estimate(float(transform(given.mean())), ends[0], ends[1], count if samples is None else samples)
