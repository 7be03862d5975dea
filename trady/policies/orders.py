"""Random orders of channels that depend on their arguments alone: the same on every rank, machine and restart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trady.errors import PolicyError
from trady.policies.evidence import Floats
from trady.policies.fill import Integers


def random_bits(count: int, seed: int, epoch: int, redraw: int) -> npt.NDArray[np.uint64]:
    """64 random bits a channel, ``[count]``, that depend on the arguments alone.

    They are the raw output of PCG64, which NumPy guarantees not to change between versions (the methods of
    ``Generator`` may change), so a run resumes on another machine as it began.

    Raises:
        PolicyError: When the seed is not in 0 … 2**64 - 1, or epoch or redraw not in 0 … 2**32 - 1.
    """
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**32 and 0 <= redraw < 2**32):
        raise PolicyError(
            f"seed {seed}, epoch {epoch}, redraw {redraw}: they start at 0, "
            "seeds end below 2**64 and the others below 2**32"
        )
    # One word each: numbers of varying length would let one draw's seed be another draw's epoch.
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch, redraw]
    return np.asarray(np.random.PCG64(np.random.SeedSequence(words)).random_raw(count), dtype=np.uint64)


def shuffled(count: int, seed: int, epoch: int, redraw: int) -> Integers:
    """A uniformly random order of ``range(count)``, by :func:`random_bits`, with its errors."""
    return np.argsort(random_bits(count, seed, epoch, redraw), kind="stable").astype(np.int64, copy=False)


def weighted_order(weights: Floats, seed: int, epoch: int, redraw: int) -> Integers:
    """A random order: the next channel is drawn, of those left, with probability proportional to its weight.

    By the keys of Efraimidis and Spirakis (2006): the smallest -ln(u_c) / w_c first, u_c uniform in (0, 1). Channels
    of weight 0 come last, in uniformly random order.

    Args:
        weights: One weight a channel, finite and not negative, ``[n]``; their scale does not matter.
        seed: Seed of the run.
        epoch: From 0.
        redraw: From 0.

    """
    bits = random_bits(weights.size, seed, epoch, redraw)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    with np.errstate(divide="ignore"):  # log keys: the quotient of a tiny weight would overflow
        keys = np.log(-np.log(uniform)) - np.log(weights)
    return np.lexsort((bits, keys)).astype(np.int64, copy=False)
