"""A complete run: data, loop, checkpoints, results."""

from trady.training.data.datasets import DataSplit
from trady.training.data.load import load_data
from trady.training.result import Result
from trady.training.run import finetune
from trady.training.texts.load import Texts, load_texts

__all__ = ["DataSplit", "Result", "Texts", "finetune", "load_data", "load_texts"]
