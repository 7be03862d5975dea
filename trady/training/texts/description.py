"""How the texts of a run were read, and how its model takes them: a part of ``run.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trady.records.schema import Positive

#: What a model learns from texts.
TextTask = Literal["classification", "regression", "multi-label", "language-model"]

#: What becomes of a text that is longer than the model takes.
Overflow = Literal["truncate", "split", "error"]


@dataclass(frozen=True)
class TextsDescription:
    """How texts are read.

    Attributes:
        task: What the model learned from them.
        text_columns: Columns of a table that hold the text, or the two texts of a pair.
        label_columns: Columns that hold the label, or each of several labels; empty for a language model.
        longest: Tokens that an example may have.
        overflow: What becomes of a longer one.
        chat: Whether a text is a conversation, in the tokenizer's template.
        held_out: Where a part of the rows was kept for evaluation, a digest of all of them, by which they are known
            again; ``None`` where the source had a part of its own.
        limit: Up to that many rows of a part were taken; ``None`` is all.
        seed: Of the choice of rows.
    """

    task: TextTask
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    longest: Positive
    overflow: Overflow = "truncate"
    chat: bool = False
    held_out: str | None = None
    limit: Positive | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What transformers calls such a task."""
        names = {
            "classification": "text-classification",
            "regression": "text-regression",
            "multi-label": "text-multi-label-classification",
            "language-model": "text-generation",
        }
        return names[self.task]
