"""A policy for benchmarks: the same share of the channels of every layer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn

import trady
from trady.policies import Draw, Policy


class ShareOfEveryLayer:
    """Draw ``share`` of the input channels of every layer, at least one, uniformly at random.

    Memory and time of such a step do not depend on luck: every layer trains, and every draw costs the same.

    Args:
        share: Above 0, at most 1. The number of channels is rounded to the nearest.
        once: Keep the first draw for good, as PaCA does (arXiv 2503.01905).
    """

    uses_ranking = False

    def __init__(self, share: Fraction, *, once: bool = False) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it lies above 0 and at most at 1")
        self.share, self.once = share, once
        self.name = f"static-share-{share}" if once else f"share-{share}"

    def select(self, draw: Draw) -> trady.Selection:
        """Draw for this epoch and redraw unless it is once for all."""
        epoch, redraw = (0, 0) if self.once else (draw.epoch, draw.redraw)
        random = np.random.default_rng((draw.seed, epoch, redraw))
        return trady.Selection(
            {
                layer.name: random.permutation(layer.channels)[: max(1, round(self.share * layer.channels))]
                for layer in draw.table
            }
        )


def budget_of(policy: str | Policy, model: nn.Module, example: Any) -> str:
    """Return the budget, in elements, that a policy's draw fills to the last element."""
    all_there_is = trady.plan(model, example, policy="full").cost.elements
    drawn = trady.plan(model, example, policy=policy, budget=f"elements:{all_there_is}").cost.elements
    return f"elements:{drawn}"
