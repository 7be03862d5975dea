"""Where to update: the rules that say which input channels train in an epoch.

Importing this package fills the registry.
"""

from trady.policies import extremes, oracles, uniform, velocity
from trady.policies.base import Draw, Policy
from trady.policies.draw import draw_selection, typical_selection
from trady.policies.evidence import Evidence, Needs, needs_of
from trady.policies.fill import fill, fill_selection, layers_in_order
from trady.policies.registry import get_policy, policy_names, register_policy

__all__ = [
    "Draw",
    "Evidence",
    "Needs",
    "Policy",
    "draw_selection",
    "extremes",
    "fill",
    "fill_selection",
    "get_policy",
    "layers_in_order",
    "needs_of",
    "oracles",
    "policy_names",
    "register_policy",
    "typical_selection",
    "uniform",
    "velocity",
]
