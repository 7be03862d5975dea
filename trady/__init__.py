"""Fine-tune any PyTorch model inside a memory budget.

TraDy ("Study of Training Dynamics for Memory-Constrained Fine-Tuning", ICLR 2026, arXiv 2510.19675), for
real: the bytes of what does not train are not allocated, its floating-point operations are not executed,
and a ledger measures both.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trady.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    FileError,
    LockedError,
    ModelError,
    PolicyError,
    RankingError,
    ResourceError,
    StateError,
    TradyError,
    TradyWarning,
    TrainingError,
)
from trady.records.version import __version__ as __version__

if TYPE_CHECKING:
    from trady import optim
    from trady.channels.cost import Cost
    from trady.channels.selection import Selection
    from trady.channels.table import ChannelTable, Layer, by_output
    from trady.estimates.fit import fit
    from trady.integrations.trainer import tune
    from trady.memory import Ledger, measure
    from trady.ops.loss import cross_entropy
    from trady.planning.budget import Budget, parse_budget
    from trady.planning.plan import Plan
    from trady.policies import register_policy
    from trady.prediction.load import load
    from trady.prediction.predictor import Prediction, Predictor
    from trady.quantized.dequantize import dequantize
    from trady.ranking.ranking import LayerRanking
    from trady.training import DataSplit, Result, Texts, finetune, load_data, load_texts
    from trady.tuner.delta import apply_delta
    from trady.tuner.prepare import plan, prepare
    from trady.tuner.rank import rank
    from trady.tuner.tuner import Tuner

#: Where each name comes from. It is loaded when it is asked for: PyTorch takes a second, and the command line answers
#: ``--help`` and a typo without it.
_MODULES = {
    "trady.channels.cost": ("Cost",),
    "trady.channels.selection": ("Selection",),
    "trady.channels.table": ("ChannelTable", "Layer", "by_output"),
    "trady.estimates.fit": ("fit",),
    "trady.integrations.trainer": ("tune",),
    "trady.memory": ("Ledger", "measure"),
    "trady.ops.loss": ("cross_entropy",),
    "trady.optim": ("optim",),
    "trady.planning.budget": ("Budget", "parse_budget"),
    "trady.planning.plan": ("Plan",),
    "trady.policies": ("register_policy",),
    "trady.prediction.load": ("load",),
    "trady.prediction.predictor": ("Prediction", "Predictor"),
    "trady.quantized.dequantize": ("dequantize",),
    "trady.ranking.ranking": ("LayerRanking",),
    "trady.training": ("DataSplit", "Result", "Texts", "finetune", "load_data", "load_texts"),
    "trady.tuner.delta": ("apply_delta",),
    "trady.tuner.prepare": ("plan", "prepare"),
    "trady.tuner.rank": ("rank",),
    "trady.tuner.tuner": ("Tuner",),
}

_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trady' has no attribute {name!r}")
    module = import_module(_HOME[name])
    found = module if _HOME[name] == f"trady.{name}" else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Budget",
    "BudgetError",
    "ChannelTable",
    "CheckpointError",
    "Cost",
    "DataError",
    "DataSplit",
    "FileError",
    "Layer",
    "LayerRanking",
    "Ledger",
    "LockedError",
    "ModelError",
    "Plan",
    "PolicyError",
    "Prediction",
    "Predictor",
    "RankingError",
    "ResourceError",
    "Result",
    "Selection",
    "StateError",
    "Texts",
    "TradyError",
    "TradyWarning",
    "TrainingError",
    "Tuner",
    "apply_delta",
    "by_output",
    "cross_entropy",
    "dequantize",
    "finetune",
    "fit",
    "load",
    "load_data",
    "load_texts",
    "measure",
    "optim",
    "parse_budget",
    "plan",
    "prepare",
    "rank",
    "register_policy",
    "tune",
]
