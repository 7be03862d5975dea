"""Fine-tune any PyTorch model inside a memory budget.

TraDy ("Study of Training Dynamics for Memory-Constrained Fine-Tuning", ICLR 2026, arXiv 2510.19675), for
real: the bytes of what does not train are not allocated, its floating-point operations are not executed,
and a ledger measures both.
"""

from trady.budget import Budget, parse_budget
from trady.channels import ChannelTable, Layer, Selection
from trady.delta import apply_delta
from trady.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    ModelError,
    PolicyError,
    RankingError,
    StateError,
    TradyError,
    TrainingError,
)
from trady.memory import Ledger, measure
from trady.plan import Cost, Plan
from trady.policies import register_policy
from trady.ranking import LayerRanking
from trady.sweeps import rank
from trady.tuner import Tuner, plan, prepare

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "ChannelTable",
    "CheckpointError",
    "Cost",
    "DataError",
    "Layer",
    "LayerRanking",
    "Ledger",
    "ModelError",
    "Plan",
    "PolicyError",
    "RankingError",
    "Selection",
    "StateError",
    "TradyError",
    "TrainingError",
    "Tuner",
    "apply_delta",
    "measure",
    "parse_budget",
    "plan",
    "prepare",
    "rank",
    "register_policy",
]
