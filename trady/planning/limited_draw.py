"""Draws that keep a limit to the operations of a step: from later layers, and of the last one fewer channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trady.channels.selection import Selection
from trady.planning.spending import Spending
from trady.planning.step_flops import StepLimit
from trady.policies.base import names_layers


def draw_within(
    steps: StepLimit, draw: Callable[[Spending], Selection], spending: Spending, epoch: int, redraw: int
) -> Selection:
    """Draw the channels of an epoch; where a step would take more than the limit, draw again from later layers.

    Args:
        steps: Counts what a step takes, and has the limit.
        draw: Draws within the budget.
        spending: The moment.
        epoch: From 0.
        redraw: From 0.

    Raises:
        PolicyError: The policy is given its layers, and the way back to them takes too much.

    """
    recomputation = spending.moment.recomputation
    selection = draw(spending)
    while steps.exceeded(selection, recomputation):
        if names_layers(spending.policy):
            raise steps.refusal(spending.policy, selection, recomputation)
        layers = spending.drawable.names
        early = steps.too_early(selection, recomputation, layers)
        spending = replace(spending, held=spending.held | (early - {layers[-1]}))
        if len(early) == len(layers):  # even of the last layer these are too many
            return _fewer(steps, draw(spending), spending, epoch, redraw)
        selection = draw(spending)
    return selection


def _fewer(steps: StepLimit, selection: Selection, spending: Spending, epoch: int, redraw: int) -> Selection:
    """Halve the interval of what is spent until the draw takes the limit to within 1 %."""
    if not steps.exceeded(selection, spending.moment.recomputation):
        return selection
    low, high, best = 0, spending.draw_of(epoch, redraw, None).total(selection), Selection()
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        fewer = spending.select(epoch, redraw, middle)
        if steps.exceeded(fewer, spending.moment.recomputation):
            high = middle
        else:
            low, best = middle, fewer
    return best
