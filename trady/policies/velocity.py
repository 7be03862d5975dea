"""Velocity: the output channels whose outputs change direction fastest, until the budget is full.

Bragagnolo, Tartaglione and Grangetto, "To update or not to update? Neurons at equilibrium in deep models" (NeurIPS
2022, arXiv 2207.09455); under a budget: Quélennec, Tartaglione, Mozharovskyi and Nguyen, "Towards on-device learning
on the edge: ways to select neurons to update under a budget constraint" (WACV workshops 2024, arXiv 2312.05282). The
papers call an output channel a neuron. With φ_i^t the mean cosine similarity between the feature map of output channel
i on a few fixed samples and the same map an epoch ago (:mod:`trady.evidence.velocity` measures it),

    v_i^t = (φ_i^t - φ_i^{t-1}) - μ v_i^{t-1},    score_i = |v_i^t| / (weight elements of output channel i)

output channels are taken by descending score until the budget is full, chosen again before each epoch and fixed during
it. While nothing has moved (in the first epoch) they are drawn at random, as are output channels of equal score.

What it spends that TraDy does not: a copy of what trains, which budgets in bytes count; two inference passes over up to
32 observed samples before each epoch; and, since an output channel reads all of its layer's input, full inputs. The
papers keep the feature maps of all layers on these samples from one epoch to the next; here the copy computes them
again, one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trady.channels.selection import Selection
from trady.policies.base import Draw
from trady.policies.evidence import Needs
from trady.policies.orders import shuffled
from trady.policies.output_channels import by_unit, fill_output_channels, one_of_each, unit_count, unit_weights
from trady.policies.registry import register_policy


@register_policy
class Velocity:
    """argmax Σ |v_i| / C^W_i over output channels i, until Σ full inputs + C^W_i = B_mem."""

    name = "velocity"
    uses_ranking = False
    needs = Needs(("velocity",), each_epoch=True)

    def select(self, draw: Draw) -> Selection:
        """Take the output channels that are fastest for their weight, of all layers."""
        layers, velocity = draw.table.layers, draw.measured("velocity")
        scores = [by_unit(layer, np.abs(velocity[layer.name])) / unit_weights(layer) for layer in layers]
        flat = np.concatenate(scores) if scores else np.empty(0)
        order = shuffled(flat.size, draw.seed, draw.epoch, 0)
        # NaN, from a feature map that overflowed, comes last.
        return fill_output_channels(
            draw, layers, order[np.argsort(-np.nan_to_num(flat[order], nan=-1.0), kind="stable")]
        )

    def typical(self, draw: Draw) -> Selection:
        """Draw output channels at random, as in the first epoch."""
        count = sum(unit_count(layer) for layer in draw.table)
        return fill_output_channels(draw, draw.table.layers, shuffled(count, draw.seed, draw.epoch, 0))

    def smallest(self, draw: Draw) -> Iterator[Selection]:
        """One output channel of each layer: the smallest possible updates."""
        return one_of_each(draw)
