"""Fine-tune any PyTorch model inside a memory budget.

TraDy ("Study of Training Dynamics for Memory-Constrained Fine-Tuning", ICLR 2026, arXiv 2510.19675), for
real: the bytes of what does not train are not allocated, its floating-point operations are not executed,
and a ledger measures both.
"""

from typing import TYPE_CHECKING, Any

from trady import optim
from trady.channels.cost import Cost
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable, Layer, by_output
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
from trady.memory import Ledger, measure
from trady.ops.loss import cross_entropy
from trady.planning.budget import Budget, parse_budget
from trady.planning.plan import Plan
from trady.policies import register_policy
from trady.quantized.dequantize import dequantize
from trady.ranking.ranking import LayerRanking
from trady.records.version import __version__ as __version__
from trady.tuner.delta import apply_delta
from trady.tuner.prepare import plan, prepare
from trady.tuner.rank import rank
from trady.tuner.tuner import Tuner

if TYPE_CHECKING:
    from trady.estimates.fit import fit
    from trady.integrations.trainer import tune
    from trady.prediction.load import load
    from trady.prediction.predictor import Prediction, Predictor
    from trady.training import DataSplit, Result, Texts, finetune, load_data, load_texts

#: Loaded when they are asked for: an own training loop needs neither Accelerate nor a data set.
_TRAINING = ("DataSplit", "Result", "Texts", "finetune", "load_data", "load_texts")


def __getattr__(name: str) -> Any:
    if name in _TRAINING:
        import trady.training

        return getattr(trady.training, name)
    if name in ("Prediction", "Predictor"):
        import trady.prediction.predictor

        return getattr(trady.prediction.predictor, name)
    if name == "load":
        from trady.prediction.load import load

        return load
    if name == "fit":
        from trady.estimates.fit import fit

        return fit
    if name == "tune":
        from trady.integrations.trainer import tune

        return tune
    raise AttributeError(f"module 'trady' has no attribute {name!r}")


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
