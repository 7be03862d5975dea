"""Channels drawn uniformly at random: TraDy and its three baselines.

They differ in two answers only (arXiv 2510.19675): may channels come from the
pool of top-K layers or from all layers, and are they drawn anew or once?
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from trady.channels import Selection
from trady.errors import PolicyError
from trady.policies.base import Draw
from trady.policies.fill import Integers, fill_selection, layers_in_order
from trady.policies.registry import register_policy


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
    """A uniformly random order of ``range(count)``: that of :func:`random_bits`, whose errors are its own."""
    return np.argsort(random_bits(count, seed, epoch, redraw), kind="stable").astype(np.int64, copy=False)


def draw_uniformly(draw: Draw, names: Collection[str], *, once: bool) -> Selection:
    """Fill the capacity with channels of the named layers, every order of them equally likely.

    Args:
        draw: The draw to answer.
        names: Layers that channels may come from, in any order.
        once: Ignore epoch and redraw. The selection is then that of epoch 0, so a static policy
            starts on the very channels of its dynamic twin.
    """
    layers = layers_in_order(draw, names)
    count = sum(layer.channels for layer in layers)
    epoch, redraw = (0, 0) if once else (draw.epoch, draw.redraw)
    return fill_selection(draw, layers, shuffled(count, draw.seed, epoch, redraw))


@register_policy
class TraDy:
    """c ~ U(channels of the top-K layers), anew in each epoch, until Σ C^W_c + C^A_c = B_mem.

    The paper's method (arXiv 2510.19675).
    """

    name = "trady"
    uses_ranking = True

    def select(self, draw: Draw) -> Selection:
        """Draw from the pool, anew for this epoch and redraw."""
        return draw_uniformly(draw, draw.pool, once=False)


@register_policy
class DynamicRandom:
    """c ~ U(channels of all layers), anew in each epoch, until Σ C^W_c + C^A_c = B_mem.

    "D-Full Random" of arXiv 2510.19675.
    """

    name = "dynamic-random"
    uses_ranking = False

    def select(self, draw: Draw) -> Selection:
        """Draw from all layers, anew for this epoch and redraw."""
        return draw_uniformly(draw, draw.table.names, once=False)


@register_policy
class StaticRandom:
    """c ~ U(channels of all layers), once, until Σ C^W_c + C^A_c = B_mem.

    "S-Full Random" of arXiv 2510.19675; close to PaCA (arXiv 2503.01905), which
    takes the same number of random channels in each layer.
    """

    name = "static-random"
    uses_ranking = False

    def select(self, draw: Draw) -> Selection:
        """Draw from all layers, the same channels in every epoch."""
        return draw_uniformly(draw, draw.table.names, once=True)


@register_policy
class StaticTopKRandom:
    """c ~ U(channels of the top-K layers), once, until Σ C^W_c + C^A_c = B_mem.

    The static twin of TraDy (arXiv 2510.19675). The channels change only when the
    pool does, that is when an online ranking settles.
    """

    name = "static-topk-random"
    uses_ranking = True

    def select(self, draw: Draw) -> Selection:
        """Draw from the pool, the same channels in every epoch."""
        return draw_uniformly(draw, draw.pool, once=True)
