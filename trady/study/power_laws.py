"""Is a tail a power law? Likelihood ratios against the log-normal and the exponential law."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import TrainingError
from trady.study.tails import FEWEST_IN_TAIL, TAIL_SHARE

#: Maximum number of samples that are fitted, drawn with the seed: the likelihood is a sum over all of them.
MOST_SAMPLES = 20_000


@dataclass(frozen=True)
class Comparison:
    """A power law against another law, on the same tail.

    Attributes:
        ratio: Log-likelihood ratio; above 0 the power law is the likelier one.
        p: Of the test that neither is better.
    """

    ratio: float
    p: float

    @property
    def verdict(self) -> int:
        """1 for the power law, -1 for the other, 0 where the test does not tell them apart at 5 %."""
        return 0 if not self.p < 0.05 else 1 if self.ratio > 0 else -1


@dataclass(frozen=True)
class PowerLaw:
    """A power law fitted to a tail.

    Attributes:
        exponent: Of the density, one more than the tail index.
        threshold: Where the tail begins.
        tail: Number of values in it.
        against_lognormal: See :class:`Comparison`.
        against_exponential: See :class:`Comparison`.
    """

    exponent: float
    threshold: float
    tail: int
    against_lognormal: Comparison
    against_exponential: Comparison


def fit_power_law(samples: npt.ArrayLike, *, share: float = TAIL_SHARE, seed: int = 0) -> PowerLaw | None:
    """Fit a power law to the largest absolute values by maximum likelihood, and compare it.

    Clauset, Shalizi and Newman 2009 (arXiv 0706.1062), by the package ``powerlaw`` (Alstott, Bullmore and Plenz
    2014, arXiv 1305.0215). The tail is the largest ``share`` of the samples, the same for every layer, rather than the
    share whose fit is best, so that layers can be compared.

    The exponential law is compared by Vuong's test. The log-normal has the power law as a limit (of large sigma), so
    its likelihood is hardly ever the lower one, and the test is that of nested laws, 2 |ratio| against chi-squared:
    with Vuong's, true power laws are rejected for differences of a fraction of a bit.

    Args:
        samples: Any shape; zeros are left out, and of more than :data:`MOST_SAMPLES` that many are drawn.
        share: Share of the samples that counts as the tail.
        seed: Of that drawing.

    Returns:
        The fit, or ``None`` where the tail has fewer than :data:`FEWEST_IN_TAIL` values or no spread.

    Raises:
        TrainingError: The package is not installed.
    """
    values = np.abs(np.asarray(samples, dtype=np.float64).ravel())
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) > MOST_SAMPLES:
        values = np.random.default_rng(seed).choice(values, MOST_SAMPLES, replace=False)
    values.sort()
    count = int(share * len(values))
    if count < FEWEST_IN_TAIL or values[-1] == values[-count]:
        return None
    fit = _fit(values[-count:] / values[-count])  # the fits' starting points suit a threshold of one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that end at the edge of a parameter's range
        compared = [
            Comparison(*map(float, fit.distribution_compare("power_law", law, nested=nested)))
            for law, nested in (("lognormal", True), ("exponential", False))
        ]
        exponent = float(fit.power_law.alpha)
    return PowerLaw(exponent, float(values[-count]), count, *compared)


def _fit(tail: npt.NDArray[np.float64]) -> Any:
    try:
        import powerlaw
    except ImportError:
        raise TrainingError('fits of power laws need an extra: pip install "trady[study]"') from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its default bound on the exponent is 3, where fits of lighter tails would end and lose every comparison.
        return powerlaw.Fit(tail, xmin=1.0, discrete=False, verbose=False, parameter_ranges={"alpha": [1, None]})
