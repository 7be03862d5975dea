"""What is asked about: a model without memory, and batches of any size and length for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trady.errors import ModelError
from trady.model.batch import Batch
from trady.model.structure import with_tensors
from trady.simulation.meta_copy import meta_copy
from trady.training.models.from_config import longest_text, read_dtype
from trady.training.models.from_function import FUNCTION
from trady.training.models.from_transformers import TRANSFORMERS
from trady.training.models.load import LoadedModel, load_model
from trady.training.models.planned import make_planned
from trady.training.models.source import source_of

#: Tokens of a sequence where nobody says how many.
USUAL_LENGTH = 512

#: Token ids of a function's model are drawn below this.
_IDS = 100

#: Makes a batch of so many samples, of tokens of that length.
Batches = Callable[[int, int | None], Any]


@dataclass(frozen=True)
class Subject:
    """A model, and the batches that it takes.

    Attributes:
        name: As it was typed, or its class.
        model: To look at, with or without memory.
        bare: The same without memory, in the dtype that was asked for.
        of: Makes batches.
        batch_size: Samples that were asked about.
        length: Tokens of a sequence; ``None`` for a model of something else.
        image_size: Height and width of an image; ``None`` for a model of something else.
        dtype: Of the weights.
    """

    name: str
    model: nn.Module
    bare: nn.Module
    of: Batches
    batch_size: int
    length: int | None
    image_size: int | None
    dtype: torch.dtype

    @property
    def longest(self) -> int | None:
        """The most tokens that the model's positions are for; ``None`` where it does not say."""
        found = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def batch(self, count: int, length: int | None) -> Batch:
        """Make a batch."""
        made = Batch.of(self.of(count, length), self.bare)
        return made.to(self.dtype) if self.dtype in (torch.float16, torch.bfloat16) else made


def subject_of_module(
    model: nn.Module, example: Any, dtype: str | torch.dtype | None, batch_size: int | None, length: int | None
) -> Subject:
    """Ask about a module and a batch of the user's own, which is cut, repeated and stretched.

    Raises:
        ModelError: There is no batch, or no length in it.

    """
    if example is None:
        raise ModelError("trady.fit(model) needs an example batch beside a module: trady.fit(model, batch)")
    batch = Batch.of(example, model)
    found = _length_in(batch)
    if length is not None and found is None:
        raise ModelError(
            f"length={length} is for batches with token ids [samples, tokens]; this one has {batch.shapes}"
        )
    wanted = read_dtype(dtype) if isinstance(dtype, str) else dtype
    bare = meta_copy(model)
    return Subject(
        type(model).__name__,
        model,
        bare if wanted is None else bare.to(wanted),
        lambda count, length: _resized(batch, count, found, length),
        batch_size or batch.samples,
        length or found,
        None,
        wanted or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
    )


def subject_of_name(
    name: str,
    *,
    classes: int,
    batch_size: int,
    length: int | None,
    image_size: int | None,
    dtype: str | None,
    seed: int,
) -> Subject:
    """Ask about a model by its name; models of transformers and of functions are made without memory.

    Raises:
        ModelError: There is no such model, or it takes something else.

    """
    source = source_of(name)
    if source is TRANSFORMERS:
        if length is None and image_size is None and (longest := longest_text(name)) is not None:
            length = min(USUAL_LENGTH, longest)
        tokens = None if length is None else f"{batch_size}x{length}"
        planned = make_planned(name, classes, image_size, batch_size, tokens, dtype, seed)
        kind = next(p.dtype for p in planned.model.parameters())
        return Subject(
            name, planned.model, planned.model, planned.of, batch_size, planned.length, planned.image_size, kind
        )
    loaded = _without_memory(name, classes, seed) if source is FUNCTION else load_model(name, classes, seed=seed)
    kind = read_dtype(dtype) or torch.float32
    bare = meta_copy(loaded.model).to(kind)
    side = None if length is not None else image_size or loaded.image_size

    def of(count: int, length: int | None) -> Any:
        if side is not None:
            return torch.empty(count, 3, side, side, dtype=kind, device="meta")
        ids = torch.randint(1, _IDS, (count, length or USUAL_LENGTH), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids} if "input_ids" in inspect.signature(bare.forward).parameters else ids

    return Subject(name, loaded.model, bare, of, batch_size, length, side, kind)


def _without_memory(name: str, classes: int, seed: int) -> LoadedModel:
    """Call a user's function so that what it makes takes no memory; as it is, where it cannot do without values."""
    try:
        with torch.device("meta"):
            return load_model(name, classes, seed=seed)
    except Exception:  # whatever a constructor does with values: the call below says what is wrong, if anything is
        return load_model(name, classes, seed=seed)


def _length_in(batch: Batch) -> int | None:
    """Return the tokens of a sequence; ``None`` where there are no ids."""
    ids = (t for t in batch.tensors if t.dim() == 2 and not t.is_floating_point() and t.shape[0] == batch.samples)
    return next((int(t.shape[1]) for t in ids), None)


def _resized(batch: Batch, count: int, before: int | None, length: int | None) -> Any:
    """Make a batch of another size, of the same samples and tokens again and again."""

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != batch.samples:
            return tensor
        stretched = tensor.dim() > 1 and tensor.shape[1] == before
        tokens = (length if stretched and length is not None else tensor.shape[1],) if tensor.dim() > 1 else ()
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.empty((count, *tokens, *tensor.shape[2:]), dtype=tensor.dtype, device="meta")
        found = tensor[torch.arange(count, device=tensor.device) % batch.samples]
        return found[:, torch.arange(tokens[0], device=tensor.device) % tensor.shape[1]] if tokens else found

    return with_tensors(batch.inputs, resized)
