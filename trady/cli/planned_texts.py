"""A model to plan for, and batches of the texts that it is to be trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trady.training.models.planned import Planned


def refuse_for_plan(dataset: str, tokens: str | None, image_size: int | None) -> None:
    """Refuse what a plan does not need, where it is made for data.

    Raises:
        DataError: The data are no texts, or the batch was typed as well.
    """
    from trady.errors import DataError
    from trady.training.texts.tables import is_texts

    if not is_texts(dataset):
        raise DataError(f"{dataset} is no data of texts: a plan for images needs no data, only --image-size")
    if tokens is not None or image_size is not None:
        raise DataError("--tokens and --image-size say what a batch is like, and the texts say it: leave them out")


def plan_texts(
    model: str, dataset: str, batch_size: int, dtype: str | None, seed: int
) -> tuple[Planned, Callable[[Any], Tensor] | None]:
    """Return the model without weights, batches like the longest of the texts, and their loss if it is one of its own.

    Raises:
        DataError: The texts cannot be read.
        ModelError: There is no such model, or it is none of texts.
    """
    from trady.training.batch import cross_entropy
    from trady.training.models.from_config import read_dtype, skeleton
    from trady.training.models.planned import Planned
    from trady.training.objective import of_output
    from trady.training.texts.load import read_for
    from trady.training.texts.reading import Reading

    parts = read_for(model, Reading(dataset, seed=seed))
    typer.echo(parts.summary, err=True)
    data = parts.train
    generates = data.description.task == "language-model"
    found = skeleton(
        model, len(parts.classes) or 1, tokens=True, length=None, dtype=read_dtype(dtype), generates=generates
    )
    largest = data.largest(batch_size)
    width = largest["input_ids"].shape[1]

    def inputs(count: int, length: int | None) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in data.largest(count).items() if name != "labels"}

    count = len(largest["labels"])
    planned = Planned(found.model, count, f"× {width} tokens", inputs, width)
    own = data.objective.loss is not cross_entropy  # which a plan knows by itself
    return planned, of_output(data.objective.loss, largest["labels"]) if own else None
