"""No budget at all: for the policies that go without one."""

from __future__ import annotations

from trady.planning.scopes.elements import Elements
from trady.planning.spending import Spending


class Unlimited(Elements):
    """Nothing is bounded; costs are counted in elements. It cannot be asked for by name."""

    name = "unlimited"
    meaning = "nothing"
    example = ""

    def drawable(self, spending: Spending, amount: int) -> list[str]:
        """All layers."""
        return list(spending.table.names)


UNLIMITED = Unlimited()
