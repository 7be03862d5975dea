"""Channels drawn uniformly at random: TraDy and its three baselines.

They differ in two things only (arXiv 2510.19675): channels come from the pool of top-K layers or
from all layers, and they are drawn in each epoch or once.
"""

from __future__ import annotations

from collections.abc import Collection

from trady.channels.selection import Selection
from trady.policies.base import Draw
from trady.policies.fill import fill_selection, layers_in_order
from trady.policies.orders import shuffled
from trady.policies.registry import register_policy


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
    """c ~ U(channels of the top-K layers), again in each epoch, until Σ C^W_c + C^A_c = B_mem.

    The paper's method (arXiv 2510.19675).
    """

    name = "trady"
    uses_ranking = True

    def select(self, draw: Draw) -> Selection:
        """Draw from the pool for this epoch and redraw."""
        return draw_uniformly(draw, draw.pool, once=False)


@register_policy
class DynamicRandom:
    """c ~ U(channels of all layers), again in each epoch, until Σ C^W_c + C^A_c = B_mem.

    "D-Full Random" of arXiv 2510.19675.
    """

    name = "dynamic-random"
    uses_ranking = False

    def select(self, draw: Draw) -> Selection:
        """Draw from all layers for this epoch and redraw."""
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
