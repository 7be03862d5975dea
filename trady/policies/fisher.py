"""TinyTrain (Kwon et al. 2024, arXiv 2307.09988): activation Fisher information over cost, once.

    Δ_c = ½ · mean over samples of (Σ_positions a_c · ∂L/∂a_c)²          of a channel's activations a_c
    P_i = Σ_c Δ_c                                                        the Fisher potential of layer i
    s_i = P_i / ( |W_i| / max_l |W_l|  ·  MAC_i / max_l MAC_l )          weights and multiply-adds of the layer

Layers are taken by descending s_i, the channels inside a layer by descending Δ_c, until the budget is full.

Where it departs from the paper: a_c is the input of a layer here, the unit that saves memory, and not its output. The
paper fixes beforehand how many channels a layer may train and which blocks may train at all, to fit a device; here the
budget alone decides, so all channels of a layer train before the next layer begins. And the samples are ordinary
batches of the training data, not the support set of an episode.

What it spends that TraDy does not: once, before training, a forward and backward pass over each observed batch for each
of the selections that all channels have to be cut into (:mod:`trady.evidence.fisher_information`).
"""

from __future__ import annotations

import numpy as np

from trady.channels.selection import Selection
from trady.policies.base import Draw
from trady.policies.evidence import Needs
from trady.policies.fill import Integers, fill_selection
from trady.policies.registry import register_policy


@register_policy
class Fisher:
    """Layers by Fisher potential over cost, channels inside a layer by Fisher information; the same in every epoch."""

    name = "fisher"
    uses_ranking = False
    needs = Needs(("fisher",))

    def select(self, draw: Draw) -> Selection:
        """Fill the budget layer by layer."""
        information, layers = draw.measured("fisher"), draw.table.layers
        weights = np.array([layer.channels * layer.weight_elements for layer in layers], dtype=np.float64)
        work = np.array([layer.channels * layer.flops for layer in layers], dtype=np.float64)
        cost = np.maximum(weights / weights.max(initial=1), 1e-30) * np.maximum(work / work.max(initial=1), 1e-30)
        potential = np.array([information[layer.name].sum() for layer in layers])
        starts = np.cumsum([0, *(layer.channels for layer in layers)])
        order: list[Integers] = [
            starts[place] + np.argsort(-information[layers[place].name], kind="stable")
            for place in np.argsort(-potential / cost, kind="stable").tolist()
        ]
        return fill_selection(draw, layers, np.concatenate(order).astype(np.int64))
