"""A model with a batch or a data set, from what was typed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trady.training.data.datasets import DataSplit


@dataclass(frozen=True)
class Example:
    """A model with random images and labels of the right form."""

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor


def make_example(name: str, classes: int, image_size: int | None, batch_size: int, seed: int) -> Example:
    """Load a model, and draw a batch."""
    import torch

    from trady.training.models.load import load_model

    loaded = load_model(name, classes, seed=seed)
    size = image_size or loaded.image_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    return Example(loaded.model, images, torch.randint(classes, (batch_size,), generator=generator))


@dataclass(frozen=True)
class Planned:
    """A model to plan for, with or without weights, and a batch of the right form.

    Attributes:
        model: The model.
        batch_size: Samples in the batch.
        unit: What a batch counts.
        of_size: Makes a batch of another size.
    """

    model: nn.Module
    batch_size: int
    unit: str
    of_size: Callable[[int], Any]

    @property
    def example(self) -> Any:
        """The batch."""
        return self.of_size(self.batch_size)


def make_planned(
    name: str,
    classes: int,
    image_size: int | None,
    batch_size: int,
    tokens: str | None,
    dtype: str | None,
    seed: int,
) -> Planned:
    """Build a model as far as planning needs it: those of transformers from their configuration, without weights."""
    import torch

    from trady.errors import ModelError
    from trady.training.models.from_config import read_dtype, read_tokens, skeleton, token_batch
    from trady.training.models.from_transformers import TRANSFORMERS
    from trady.training.models.load import load_model
    from trady.training.models.source import source_of

    wanted = read_dtype(dtype)
    if source_of(name) is not TRANSFORMERS:
        if tokens is not None:
            raise ModelError(f"--tokens is for models of transformers; {name} takes images")
        loaded = load_model(name, classes, seed=seed)
        model, size = loaded.model.to(wanted) if wanted is not None else loaded.model, loaded.image_size
        kind = wanted or torch.float32
    else:
        sequences, length = (batch_size, None) if tokens is None else read_tokens(tokens)
        found = skeleton(name, classes, tokens=tokens is not None, length=length, dtype=wanted)
        if length is not None:
            unit = f"× {length} tokens"
            return Planned(found.model, sequences, unit, lambda count: token_batch(found, count, length, seed))
        model, size, kind = found.model, found.image_size, found.dtype
    side = image_size or size
    return Planned(model, batch_size, "images", lambda count: torch.zeros(count, 3, side, side, dtype=kind))


@dataclass(frozen=True)
class Task:
    """A model with a head for a data set."""

    model: nn.Module
    data: DataSplit


def load_task(
    model: str,
    dataset: str,
    image_size: int | None,
    limit: int | None,
    on_unreadable: str,
    seed: int,
    *,
    split: Literal["both", "train"] = "both",
) -> Task:
    """Read a data set as the model wants it, then load the model with a head for its classes."""
    from trady.training.data.load import load_data
    from trady.training.data.source import OnUnreadable
    from trady.training.models.load import image_format, load_model

    normalization, usual_size = image_format(model)
    data = load_data(
        dataset,
        image_size=image_size or usual_size,
        split=split,
        limit=limit,
        normalization=normalization,
        on_unreadable=cast(OnUnreadable, on_unreadable),
        seed=seed,
    )
    if data.skipped:
        count = f"{len(data.skipped)} unreadable image{'s' if len(data.skipped) > 1 else ''}"
        typer.echo(f"skipped {count}: {', '.join(data.skipped[:5])}", err=True)
    return Task(load_model(model, len(data.classes), seed=seed).model, data)
