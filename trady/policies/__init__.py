"""Where to update: the rules that say which input channels train in an epoch.

Importing this package fills the registry.
"""

from trady.policies import extremes, fisher, medyate, oracles, sparse_update, trady_plus, uniform, velocity
from trady.policies.base import Draw, Policy
from trady.policies.draw import draw_selection, typical_selection
from trady.policies.evidence import Evidence, Needs, needs_of
from trady.policies.fill import fill, fill_selection, layers_in_order
from trady.policies.registry import get_policy, policy_names, register_policy
from trady.policies.schemes import Scheme
from trady.policies.sparse_update import SparseUpdate

__all__ = [
    "Draw",
    "Evidence",
    "Needs",
    "Policy",
    "Scheme",
    "SparseUpdate",
    "draw_selection",
    "extremes",
    "fill",
    "fill_selection",
    "fisher",
    "get_policy",
    "layers_in_order",
    "medyate",
    "needs_of",
    "oracles",
    "policy_names",
    "register_policy",
    "sparse_update",
    "trady_plus",
    "typical_selection",
    "uniform",
    "velocity",
]
