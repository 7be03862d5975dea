"""``trady.load``: a run folder becomes a model in use."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from trady.errors import CheckpointError, DataError
from trady.prediction.generation import TextGenerator
from trady.prediction.images import ImagePredictor
from trady.prediction.predictor import Predictor
from trady.prediction.texts import TextPredictor
from trady.training.description import IMAGE_CLASSIFICATION, Which
from trady.training.models.from_run import load_trained

#: What makes predictions, by the task of a run.
_BY_TASK: dict[str, type[Predictor]] = {IMAGE_CLASSIFICATION: ImagePredictor}


class _OwnData(Predictor):
    """A run on a data set of the user's own, of which the folder does not know how an input is prepared."""

    def preprocess(self, source: object) -> Tensor:
        raise DataError(
            f"{self.run} was trained on data that trady did not read, so it does not know how an input is prepared: "
            "prepare it yourself, and give a batch to .model or .scores"
        )

    def _many(self, inputs: object) -> list[object]:
        return [self.preprocess(inputs)]


def load(
    run: str | os.PathLike[str],
    weights: Which = "last",
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> Predictor:
    """Load the model of a run, ready for use.

    Everything comes from the folder, which may lie anywhere; only ``efficientnet-lite0`` and a function
    (``package.module:function``) also need what they were made by.

    Args:
        run: The run folder of ``trady finetune`` or :func:`trady.finetune`.
        weights: ``last``, after the last epoch, or ``best``, after the epoch of the highest accuracy. The best ones can
            be loaded from a run that is not finished.
        model: The module, for a run that began with one that was made in Python. Its weights are replaced.
        device: Where it computes; where a run would train by default.

    Returns:
        The model with its ``classes``, ``preprocess`` and ``predict``.

    Raises:
        CheckpointError: There is no such run, it is not finished, of a newer trady, or damaged; or these weights are
            missing or were changed.
        ModelError: The run began with a module that was made in Python, and ``model`` is missing or another one.
    """
    if weights not in ("last", "best"):
        raise CheckpointError(f"there are no weights {weights!r} of a run; give 'last' or 'best'")
    path = Path(run)
    module, description, found = load_trained(path, weights, model)
    place = torch.device(device) if device is not None else PartialState().device
    kind = _BY_TASK.get(description.task, _OwnData)
    if description.texts is not None:
        kind = TextGenerator if description.texts.task == "language-model" else TextPredictor
    return kind(path, description, weights, found.epoch, module.to(place).eval(), place)
