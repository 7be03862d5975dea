"""``update:1 MiB``: what updating adds to a frozen forward and backward pass."""

from __future__ import annotations

from trady.channels.cost import cost_of
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.scopes.base import BudgetScope
from trady.planning.spending import Spending


class Update(BudgetScope):
    """Saved channels for the full batch, compact parameters, their gradients, and optimizer state."""

    name = "update"
    meaning = "what updating adds"
    example = "update:1 MiB"

    def prices(self, table: ChannelTable, copies: int) -> tuple[int, int]:
        """An element of the full batch; a weight, its gradient and what is kept of it."""
        return table.batch * table.element_bytes, table.weight_element_bytes * (2 + copies)

    def priced_draws(self, draws: int) -> int:
        """All of them: float channels of quantised layers are part of what updating adds."""
        return draws

    def step_amount(self, spending: Spending, selection: Selection) -> int:
        """Saved channels, compact parameters, gradients and state."""
        return spending.cost(selection).update_bytes

    def measuring(self, spending: Spending, selection: Selection, kept: int, table: ChannelTable) -> int:
        """Saved channels and their gradients; the optimizer's state is that of the channels that train."""
        return cost_of(table, selection).update_bytes + kept

    def has_room(self, spending: Spending, selection: Selection, float_bytes: int, amount: int) -> bool:
        """Held against what updating adds."""
        return spending.cost(selection, float_bytes).update_bytes <= amount
