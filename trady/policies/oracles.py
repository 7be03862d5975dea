"""The oracles: the channels with the largest gradients, known by measuring the gradients of all.

TraDy's paper (arXiv 2510.19675) has them as D-Det RGN and S-Det RGN, and the same by plain norm. With the
stochastic gradients' squared norms averaged over the observed batches,

    RGN_c = sqrt(mean ‖∂L/∂W[:, c]‖₂²) / (C^W_c + C^A_c),    norm_c = sqrt(mean ‖∂L/∂W[:, c]‖₂²)

are the scores; channels are taken by descending score until B_mem is full.

What they spend that TraDy does not: all channels are cut into selections that fit in the budget, and each selection
takes a forward and backward pass over the observed batches, before every epoch (dynamic) or once (static). At tight
budgets that is many times the training itself, so they show what is possible, not what is worth doing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trady.channels.selection import Selection
from trady.policies.base import Draw
from trady.policies.evidence import Needs
from trady.policies.fill import fill_by_score
from trady.policies.registry import register_policy
from trady.ranking.scores import Metric, channel_scores


@dataclass(frozen=True)
class Oracle:
    """Highest score first until the budget is full.

    Attributes:
        name: Name of the policy.
        metric: ``rgn``, or ``norm`` for the gradient norm whatever a channel costs.
        needs: The squared gradients of all channels, measured before every epoch or once.
    """

    name: str
    metric: Metric
    needs: Needs
    uses_ranking: bool = field(default=False, init=False)

    def select(self, draw: Draw) -> Selection:
        """Take the channels of the highest scores, of all layers."""
        squared = draw.measured("gradients")
        scores = {layer.name: channel_scores(squared[layer.name], layer, self.metric) for layer in draw.table}
        return fill_by_score(draw, draw.table.layers, scores)


register_policy(Oracle("dynamic-rgn", "rgn", Needs(("gradients",), each_epoch=True)))
register_policy(Oracle("static-rgn", "rgn", Needs(("gradients",))))
register_policy(Oracle("dynamic-norm", "norm", Needs(("gradients",), each_epoch=True)))
register_policy(Oracle("static-norm", "norm", Needs(("gradients",))))
