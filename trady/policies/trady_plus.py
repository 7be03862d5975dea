"""trady+: TraDy where cheap channels are drawn more often, in inverse proportion to their cost.

    P(c is drawn next) ∝ 1 / (C^W_c + C^A_c) of those not drawn yet, in the top-K layers, again in each epoch, until
    Σ C^W_c + C^A_c = B_mem

TraDy (arXiv 2510.19675) draws channels uniformly. At a tight budget a few channels of early layers, whose feature maps
are large, then take most of the budget, and a draw trains few channels. Drawn in inverse proportion to their cost, up
to twice as many channels train in the same budget, in more layers, most of them after the large feature maps: weight
gradients get cheaper, and where no early layer is drawn at all the backward pass ends sooner.

It spends nothing that TraDy does not. ``benchmarks/paper`` compares the two.
"""

from __future__ import annotations

import numpy as np

from trady.channels.selection import Selection
from trady.policies.base import Draw
from trady.policies.fill import fill_selection, layers_in_order
from trady.policies.orders import weighted_order
from trady.policies.registry import register_policy


@register_policy
class TraDyPlus:
    """c ~ 1 / (C^W_c + C^A_c) in the top-K layers, without replacement, again in each epoch."""

    name = "trady+"
    uses_ranking = True

    def select(self, draw: Draw) -> Selection:
        """Draw from the pool for this epoch and redraw, cheap channels more often."""
        layers = layers_in_order(draw, draw.pool)
        weights = np.array([1.0 / layer.elements for layer in layers])
        channels = np.array([layer.channels for layer in layers], dtype=np.int64)
        order = weighted_order(np.repeat(weights, channels), draw.seed, draw.epoch, draw.redraw)
        return fill_selection(draw, layers, order)
