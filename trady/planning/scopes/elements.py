"""``elements:27946``: B_mem of the paper (arXiv 2510.19675), weight plus activation elements for one sample."""

from __future__ import annotations

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.scopes.base import BudgetScope
from trady.planning.spending import Spending


class Elements(BudgetScope):
    """Weight and activation elements of the selected channels, for one sample."""

    name = "elements"
    meaning = "B_mem of the paper"
    example = "elements:27946"
    in_bytes = False

    def measuring(self, spending: Spending, selection: Selection, kept: int, table: ChannelTable) -> int:
        """A number of one sample is one a channel, which no channel has fewer weights than."""
        return spending.table.elements(selection)
