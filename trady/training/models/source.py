"""What a source of models is, and the registry of sources.

A source is one file beside this one and one registration in the package's ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from trady.training.data.datasets import CENTERED, Normalization


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with a new head, and what it expects of its images.

    Attributes:
        model: Gives class scores ``[N, classes]`` for images ``[N, 3, H, W]``.
        normalization: Of the pixels.
        image_size: The height and width that it was trained at.
    """

    model: nn.Module
    normalization: Normalization = CENTERED
    image_size: int = 224


@dataclass(frozen=True)
class ModelSource:
    """Where models of some names come from.

    Attributes:
        examples: How such a model is named, for people.
        matches: Whether a name is meant for this source; the model need not exist.
        load: Takes a name and a number of classes; returns the pretrained model with a new head.
        image_format: Takes a name; returns the normalization and image size, without weights where that is possible.
        check: Refuses a name that ``load`` could not load at all, without loading weights.
        names: Names that are known beforehand.
        for_classes: Takes a name and the names of the classes, where a model may know them: it keeps its head for the
            same classes in the same order.
    """

    examples: str
    matches: Callable[[str], bool]
    load: Callable[[str, int], LoadedModel]
    image_format: Callable[[str], tuple[Normalization, int]]
    check: Callable[[str], object]
    names: tuple[str, ...] = ()
    for_classes: Callable[[str, tuple[str, ...]], LoadedModel] | None = None


_sources: list[ModelSource] = []


def register_model_source(source: ModelSource) -> None:
    """Have models loaded from this source as well; sources that were registered before go first."""
    _sources.append(source)


def source_of(name: str) -> ModelSource:
    """Return the source of a model; the last one that is registered takes every name."""
    return next(source for source in _sources if source.matches(name))


def possible_models(*, other_than: str = "") -> str:
    """Return how models can be named, as a list for people, without one of the sources."""
    examples = [source.examples for source in _sources if source.examples != other_than]
    return ", ".join(examples)


def known_names() -> tuple[str, ...]:
    """Return the names of models that are known beforehand."""
    return tuple(name for source in _sources for name in source.names)
