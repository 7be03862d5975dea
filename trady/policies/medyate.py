"""MeDyate (Quélennec et al. 2025, arXiv 2510.20979): channels drawn between epochs, weighted by stable importances.

    w_c = RGN_c = sqrt(mean ‖∂L/∂W[:, c]‖₂²) / (C^W_c + C^A_c)      measured once, before training
    pool = the fewest layers that carry 97 % of the layer RGN of the same measurement
    P(c is drawn next) = w_c / Σ w of those not drawn yet, in the pool, again in each epoch, until B_mem is full

The paper observes that the distribution of channel importances hardly changes during fine-tuning, so one measurement
beforehand serves all epochs.

Where it departs from the paper: its layers are chosen by a metric of its own (LaRa), here by the layer RGN that every
other policy of this library is measured with, so that they differ in the draw alone.

What it spends that TraDy does not: the gradients of all channels, measured once, in as many sweeps over the observed
batches as the budget requires.
"""

from __future__ import annotations

import numpy as np

from trady.channels.selection import Selection
from trady.policies.base import Draw
from trady.policies.evidence import Needs
from trady.policies.fill import fill_selection, layers_in_order
from trady.policies.orders import weighted_order
from trady.policies.registry import register_policy
from trady.ranking.scores import channel_scores, layer_score, top_layers


@register_policy
class MeDyate:
    """c ~ RGN_c of the pool, without replacement, again in each epoch, until Σ C^W_c + C^A_c = B_mem."""

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
