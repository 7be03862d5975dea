"""What a budget may bound: one file a kind of budget, registered here."""

from trady.planning.scopes.base import BudgetScope, DoesNotFitError
from trady.planning.scopes.elements import Elements
from trady.planning.scopes.peak import Peak
from trady.planning.scopes.process import Process
from trady.planning.scopes.update import Update

PEAK, PROCESS, UPDATE, ELEMENTS = Peak(), Process(), Update(), Elements()

#: By name, in the order in which messages list them.
SCOPES: dict[str, BudgetScope] = {scope.name: scope for scope in (PEAK, PROCESS, UPDATE, ELEMENTS)}

__all__ = ["ELEMENTS", "PEAK", "PROCESS", "SCOPES", "UPDATE", "BudgetScope", "DoesNotFitError"]
