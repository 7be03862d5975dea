"""A model to plan for, from what was typed, and batches of the right form of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trady.errors import ModelError
from trady.training.models.from_config import read_dtype, read_tokens, skeleton, token_batch
from trady.training.models.from_transformers import TRANSFORMERS
from trady.training.models.load import load_model
from trady.training.models.source import source_of


@dataclass(frozen=True)
class Planned:
    """A model to plan for, with or without weights, and a batch of the right form.

    Attributes:
        model: The model.
        batch_size: Samples in the batch.
        unit: What a batch counts.
        of: Makes a batch of so many samples, of tokens of that length.
        length: Tokens of a sequence; ``None`` for a model of images.
        image_size: Height and width of the images; ``None`` for a model of text.
    """

    model: nn.Module
    batch_size: int
    unit: str
    of: Callable[[int, int | None], Any]
    length: int | None = None
    image_size: int | None = None

    @property
    def example(self) -> Any:
        """The batch."""
        return self.of_size(self.batch_size)

    def of_size(self, count: int) -> Any:
        """Make a batch of another size."""
        return self.of(count, self.length)


def make_planned(
    name: str,
    classes: int,
    image_size: int | None,
    batch_size: int,
    tokens: str | None,
    dtype: str | None,
    seed: int,
) -> Planned:
    """Build a model as far as planning needs it: those of transformers from their configuration, without weights.

    Raises:
        ModelError: There is no such model, or it takes something else.

    """
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

            def ids(count: int, length: int | None) -> Any:
                assert length is not None
                return token_batch(found, count, length, seed)

            return Planned(found.model, sequences, f"× {length} tokens", ids, length)
        model, size, kind = found.model, found.image_size, found.dtype
    side = image_size or size
    return Planned(
        model,
        batch_size,
        "images",
        lambda count, length: torch.zeros(count, 3, side, side, dtype=kind),
        image_size=side,
    )
