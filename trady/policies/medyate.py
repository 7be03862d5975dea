"""MeDyate (Quélennec et al. 2025, arXiv 2510.20979): channels drawn between epochs, weighted by stable importances.

    w_c = RGN_c = sqrt(mean ‖∂L/∂W[:, c]‖₂²) / (C^W_c + C^A_c)      measured once, before training
    pool = the fewest layers that carry 97 % of the layer RGN of the same measurement
    P(c is drawn next) = w_c / Σ of those not drawn yet, in the pool, anew in each epoch, until B_mem is full

The paper's observation is that the distribution of channel importances hardly changes during fine-tuning, so one
measurement before it serves all epochs. It draws exactly without replacement by the keys of Efraimidis and Spirakis
(2006): the channels with the smallest -ln(u_c) / w_c, u_c uniform in (0, 1).

Where it departs from the paper: its layers are chosen by a metric of its own (LaRa), here by the layer RGN that every
other policy of this library is measured with, so that they differ in the draw alone.

What it spends that TraDy does not: the gradients of all channels, once, in as many sweeps over the observed batches as
the budget asks for.
"""

from __future__ import annotations

import numpy as np

from trady.channels import Selection
from trady.policies.base import Draw
from trady.policies.evidence import Floats, Needs
from trady.policies.fill import Integers, fill_selection, layers_in_order
from trady.policies.registry import register_policy
from trady.policies.uniform import random_bits
from trady.ranking import channel_scores, layer_score, top_layers


def weighted_order(weights: Floats, seed: int, epoch: int, redraw: int) -> Integers:
    """A random order in which the next one is drawn with probability proportional to its weight, of those left.

    It depends on the arguments alone. What has weight 0 comes last, in uniformly random order.

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


@register_policy
class MeDyate:
    """c ~ RGN_c of the pool, without replacement, anew in each epoch, until Σ C^W_c + C^A_c = B_mem."""

    name = "medyate"
    uses_ranking = False
    needs = Needs(("gradients",))

    def select(self, draw: Draw) -> Selection:
        """Draw from the layers that carry the gradient, the important channels more often."""
        squared = draw.measured("gradients")
        scores = {layer.name: layer_score(squared[layer.name], layer, "rgn") for layer in draw.table}
        layers = layers_in_order(draw, top_layers(scores))
        weights = np.concatenate([channel_scores(squared[layer.name], layer, "rgn") for layer in layers])
        return fill_selection(draw, layers, weighted_order(weights, draw.seed, draw.epoch, draw.redraw))
