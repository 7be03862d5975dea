"""trady+: TraDy with every element of the budget, not every channel, equally likely to be spent anywhere.

    P(c is drawn next) ∝ 1 / (C^W_c + C^A_c) of those not drawn yet, in the top-K layers, anew in each epoch, until
    Σ C^W_c + C^A_c = B_mem

TraDy (arXiv 2510.19675) draws channels uniformly, so at a tight budget a few channels of early layers, whose maps are
large, take most of it, and a draw trains few channels. Drawn in proportion to what a channel does not cost, the same
budget trains up to twice as many, in more layers, most of them behind the large maps: weight gradients get cheaper,
and where no early layer is drawn at all the backward pass ends sooner.

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
    """c ~ 1 / (C^W_c + C^A_c) in the top-K layers, without replacement, anew in each epoch."""

    name = "trady+"
    uses_ranking = True

    def select(self, draw: Draw) -> Selection:
        """Draw from the pool, cheap channels more often, anew for this epoch and redraw."""
        layers = layers_in_order(draw, draw.pool)
        weights = np.array([1.0 / layer.elements for layer in layers])
        channels = np.array([layer.channels for layer in layers], dtype=np.int64)
        order = weighted_order(np.repeat(weights, channels), draw.seed, draw.epoch, draw.redraw)
        return fill_selection(draw, layers, order)
