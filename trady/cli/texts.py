"""Options of texts, and a task on texts from what was typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trady.cli.choices import choice
from trady.cli.example import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from trady.training.texts.description import Overflow, TextTask

#: Where ``--help`` shows them.
_PANEL = "Texts"

TASKS = ("classification", "regression", "multi-label", "language-model")

OVERFLOWS = ("truncate", "split", "error")

TextColumn = Annotated[
    list[str] | None,
    typer.Option(
        "--text-column", help="Column of the texts; twice for pairs. Found by name without.", rich_help_panel=_PANEL
    ),
]

LabelColumn = Annotated[
    list[str] | None,
    typer.Option(
        "--label-column",
        help="Column of the labels; repeat where each label has a column of 0 and 1.",
        rich_help_panel=_PANEL,
    ),
]

EvaluationFile = Annotated[
    str | None,
    typer.Option(
        "--evaluation",
        help="A table of texts to evaluate on; without, the data's own part or a tenth.",
        rich_help_panel=_PANEL,
    ),
]

TaskName = Annotated[
    str | None,
    choice(
        "--task", possible=TASKS, panel=_PANEL, text=f"{', '.join(TASKS)}; by what the data are where nobody says it."
    ),
]

MaxLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a text, or of a block of a language model; what the model takes, or 256.",
        rich_help_panel=_PANEL,
    ),
]

OverflowOption = Annotated[
    str,
    choice(
        "--overflow",
        possible=OVERFLOWS,
        panel=_PANEL,
        text="A text longer than that: truncate it, split it into parts, or an error.",
    ),
]

#: Examples of a step where nobody says it: images and texts, and sequences of a language model.
BATCH_SIZE, SEQUENCES = 32, 8


@dataclass(frozen=True)
class TextOptions:
    """What was typed about texts."""

    text_column: list[str] | None = None
    label_column: list[str] | None = None
    evaluation: str | None = None
    task: str | None = None
    max_length: int | None = None
    overflow: str = "truncate"

    def refuse_for_images(self, dataset: str) -> None:
        """Refuse options of texts where the data are images.

        Raises:
            DataError: One was typed.
        """
        from trady.errors import DataError

        typed = {
            "--text-column": self.text_column,
            "--label-column": self.label_column,
            "--evaluation": self.evaluation,
            "--task": self.task,
            "--max-length": self.max_length,
            "--overflow": None if self.overflow == "truncate" else self.overflow,
        }
        if found := [name for name, value in typed.items() if value is not None]:
            verb = "is" if len(found) == 1 else "are"
            raise DataError(f"{' and '.join(found)} {verb} for texts, and {dataset} is none")

    def load(
        self, model: str, dataset: str, limit: int | None, seed: int, *, say: Callable[[str], object] | None = None
    ) -> Task:
        """Read the texts, say in a line what was read (on standard error by default), and load the model."""
        from trady.training.texts.load import load_texts

        found = load_texts(
            dataset,
            model,
            evaluation=self.evaluation,
            text_columns=self.text_column or (),
            label_columns=self.label_column or (),
            task=cast("TextTask | None", self.task),
            max_length=self.max_length,
            overflow=cast("Overflow", self.overflow),
            limit=limit,
            seed=seed,
        )
        for line in (*found.remarks, found.summary):
            typer.echo(line, err=True) if say is None else say(line)
        return Task(found.model, found)


def refuse_for_texts(dataset: str, typed: dict[str, Any]) -> None:
    """Refuse options of images where the data are texts.

    Raises:
        DataError: One was typed.
    """
    from trady.errors import DataError

    if found := [name for name, value in typed.items() if value]:
        raise DataError(
            f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} for images, and {dataset} is texts"
        )


def usual_batch_size(task: Task) -> int:
    """Return the examples of a step where nobody says it."""
    train: Any = task.data.train
    return SEQUENCES if train.description.task == "language-model" else BATCH_SIZE
