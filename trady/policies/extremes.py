"""The two ends of the scale: train nothing but the head, and train everything."""

from __future__ import annotations

import numpy as np

from trady.channels.selection import Selection
from trady.errors import BudgetError
from trady.policies.base import Draw
from trady.policies.fill import fill_selection
from trady.policies.registry import register_policy


@register_policy
class Head:
    """Selection = ∅: the head alone trains (it stands outside B_mem)."""

    name = "head"
    uses_ranking = False
    whole = True

    def select(self, draw: Draw) -> Selection:
        """Select no channel."""
        return Selection()


@register_policy
class Full:
    """Selection = every input channel of every layer: full fine-tuning."""

    name = "full"
    uses_ranking = False
    whole = True

    def select(self, draw: Draw) -> Selection:
        """Select every channel.

        Raises:
            BudgetError: When they do not fit; the message says what they need.
        """
        table = draw.table
        selection = fill_selection(draw, table.layers, np.arange(table.channel_count))
        if selection.count < table.channel_count:
            needed = sum(layer.channels * draw.costs[layer.name] for layer in table)
            raise BudgetError(
                f"policy 'full' needs {needed} for all {table.channel_count} channels, and the budget "
                f"leaves {draw.capacity} for channels (in the budget's own unit); add at least "
                f'{needed - (draw.capacity or 0)}, or type policy="trady", which fits any budget'
            )
        return selection
