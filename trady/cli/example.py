"""A model with a batch or a data set, from what was typed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from trady.cli.messages import Messages

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trady.training.data.datasets import DataSplit
    from trady.training.texts.load import Texts


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


#: Unreadable images that are named.
_NAMED = 20


@contextmanager
def _decoding(quiet: bool) -> Iterator[Callable[[int, int], object]]:
    """Show on a terminal, on standard error, how many image files are decoded and how long the rest takes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading images"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("images", visible=False)
        yield lambda done, count: progress.update(task, completed=done, total=count, visible=True)


@dataclass(frozen=True)
class Task:
    """A model with a head for a data set, of images or texts."""

    model: nn.Module
    data: DataSplit | Texts


def load_task(
    model: str,
    dataset: str,
    image_size: int | None,
    limit: int | None,
    on_unreadable: str,
    seed: int,
    *,
    split: Literal["both", "train"] = "both",
    messages: Messages | None = None,
    keep: Path | None = None,
) -> Task:
    """Read a data set of images as the model wants it, then load the model with a head for its classes.

    Args:
        model: As it was typed.
        dataset: As it was typed.
        image_size: Height and width; the model's own by default.
        limit: Images of a part.
        on_unreadable: What becomes of images that cannot be read.
        seed: Of a limit, a split and a new head.
        split: Which parts there must be.
        messages: Where it is said what was found; on standard error by default.
        keep: Where decoded images may be kept for a resume.

    Raises:
        DataError: The data set is one of texts, or cannot be read.
    """
    from trady.errors import DataError
    from trady.training.texts.tables import is_texts

    if is_texts(dataset):
        raise DataError(f"{dataset} is texts, which trady finetune, plan and rank take; this command takes images")
    from trady.training.data.load import load_data
    from trady.training.data.source import OnUnreadable
    from trady.training.description import is_run
    from trady.training.models.from_run import new_head
    from trady.training.models.load import image_format, load_model

    normalization, usual_size = image_format(model)
    messages = messages or Messages()
    with _decoding(messages.quiet) as progress:
        data = load_data(
            dataset,
            image_size=image_size or usual_size,
            split=split,
            limit=limit,
            normalization=normalization,
            on_unreadable=cast(OnUnreadable, on_unreadable),
            seed=seed,
            progress=progress,
            keep=keep,
        )
    messages.say(str(data))
    if data.skipped:
        count = f"{len(data.skipped)} unreadable image{'s' if len(data.skipped) > 1 else ''}"
        more = ", …" if len(data.skipped) > _NAMED else ""
        messages.say(f"skipped {count}: {', '.join(data.skipped[:_NAMED])}{more}")
    if is_run(model) and (remark := new_head(model, data.classes)) is not None:
        messages.say(remark)
    return Task(load_model(model, len(data.classes), seed=seed, classes=data.classes).model, data)
