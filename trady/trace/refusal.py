"""Why a model cannot be traced, with the line of code that is to blame and what to do."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

import trady.model
from trady.errors import ModelError
from trady.model.batch import Batch

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(trady.model.__file__).parents[1]))


def refusal(model: nn.Module, batch: Batch, error: BaseException) -> ModelError:
    """Say why a model cannot be traced on a batch.

    Args:
        model: The model.
        batch: The example.
        error: What its forward pass has raised, or an error that this is the cause of.

    """
    cause = error.__cause__ or error
    frames = list(_frames(cause.__traceback__))
    at = next((place for place in reversed(frames) if not place[0].startswith(_NOT_THE_USERS)), None)
    where = "" if at is None else f" at {at[0]}:{at[1]}: {linecache.getline(*at).strip()}"
    looks = any(words in str(cause) for words in _LOOKS)
    return ModelError(
        f"{type(model).__name__} cannot be traced on the example batch ({batch.shapes}): "
        f"{type(cause).__name__}: {cause}{where}. "
        + (_way_out(batch, frames) if looks else "The example must be one batch as training will see it.")
    )


#: How PyTorch says that a fake tensor has no values.
_LOOKS = ("meta tensor", "Meta tensor", "fake impl", "data-dependent", "no data")


def _way_out(batch: Batch, frames: list[tuple[str, int]]) -> str:
    """Say what to do about a look at values that the model or the example does not have."""
    ways = []
    if any(Path(name).parent.name == "distributions" for name, _ in frames):
        ways.append("pass validate_args=False to the distribution")
    if isinstance(batch.inputs, dict) and "labels" in batch.inputs:
        ways.append("prepare with an example without labels, and compute the loss outside of the model")
    ways.append("prepare the part of the model that does not look at values (trady.prepare(model.backbone, ...))")
    ways.append("prepare on real weights and a real example, where a look is answered by a pass on these")
    return "The forward pass looks at values here, and tensors on the meta device have none: " + ", or ".join(ways)


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
