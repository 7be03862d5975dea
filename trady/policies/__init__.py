"""Where to update: the rules that say which input channels train in an epoch.

Importing this package fills the registry.
"""

from trady.policies import extremes, uniform
from trady.policies.base import Draw, Policy
from trady.policies.draw import draw_selection
from trady.policies.fill import fill, fill_selection, layers_in_order
from trady.policies.registry import get_policy, policy_names, register_policy

__all__ = [
    "Draw",
    "Policy",
    "draw_selection",
    "extremes",
    "fill",
    "fill_selection",
    "get_policy",
    "layers_in_order",
    "policy_names",
    "register_policy",
    "uniform",
]
