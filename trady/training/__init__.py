"""A complete run: data, loop, checkpoints, results."""

from trady.training.data.datasets import DataSplit
from trady.training.data.load import load_data
from trady.training.result import Result
from trady.training.run import finetune

__all__ = ["DataSplit", "Result", "finetune", "load_data"]
