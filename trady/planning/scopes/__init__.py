"""What a budget may bound: one file a kind of budget, registered here."""

from trady.planning.scopes.base import BudgetScope, DoesNotFitError
from trady.planning.scopes.elements import Elements
from trady.planning.scopes.peak import Peak
from trady.planning.scopes.update import Update

PEAK, UPDATE, ELEMENTS = Peak(), Update(), Elements()

#: By name, in the order in which messages list them.
SCOPES: dict[str, BudgetScope] = {scope.name: scope for scope in (PEAK, UPDATE, ELEMENTS)}

__all__ = ["ELEMENTS", "PEAK", "SCOPES", "UPDATE", "BudgetScope", "DoesNotFitError"]
