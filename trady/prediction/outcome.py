"""Predictions as a table, JSON or CSV, with the accuracy where classes are known."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trady.prediction.predictor import Prediction, Predictor
from trady.records.files import write_bytes
from trady.training.data.identity import readable_names
from trady.training.metrics import told

#: Letters of a text that a table shows.
_LONGEST_TEXT = 100

#: Rows that a table shows, beside those that could not be read.
_MOST_ROWS = 50

OUTPUTS = ("label", "score")

#: The same of a language model.
GENERATED = ("generated",)


@dataclass(frozen=True)
class Outcome:
    """What ``trady predict`` found.

    Attributes:
        predictor: The run.
        predictions: One for each input, in their order.
        actual: The class that each is known to be of.
        measures: What else was measured against what is right, by name.
    """

    predictor: Predictor
    predictions: tuple[Prediction, ...]
    actual: tuple[str | None, ...]
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def unreadable(self) -> int:
        """Number of inputs that could not be read."""
        return sum(prediction.label is None for prediction in self.predictions)

    @property
    def labelled(self) -> int:
        """Number of inputs that could be read and whose class is known."""
        return len(self._hits)

    @property
    def accuracy(self) -> float | None:
        """Share of these whose label is right, 0 to 1; ``None`` where there are none, or labels are numbers."""
        return sum(self._hits) / len(self._hits) if self._hits and not self._are_numbers else None

    @property
    def _are_numbers(self) -> bool:
        texts = self.predictor.description.texts
        return texts is not None and texts.task == "regression"

    @property
    def _hits(self) -> list[bool]:
        pairs = zip(self.predictions, self.actual, strict=True)
        return [p.label == actual for p, actual in pairs if actual is not None and p.label is not None]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "run": readable_names([str(self.predictor.run)])[0],
            "weights": self.predictor.weights,
            "epoch": self.predictor.epoch,
            "accuracy": self.accuracy,
            **({"measures": dict(self.measures)} if self.measures else {}),
            "labelled": self.labelled,
            "unreadable": self.unreadable,
            "predictions": [
                self._json_of(p) if actual is None else {**self._json_of(p), "actual": actual}
                for p, actual in zip(self.predictions, self.actual, strict=True)
            ],
        }

    def _json_of(self, prediction: Prediction) -> dict[str, Any]:
        found = prediction.to_json()
        if self._outputs == GENERATED:
            found = {GENERATED[0] if key == "label" else key: value for key, value in found.items() if key != "score"}
        return found

    @property
    def _outputs(self) -> tuple[str, ...]:
        texts = self.predictor.description.texts
        return GENERATED if texts is not None and texts.task == "language-model" else OUTPUTS

    def write_csv(self, path: Path) -> None:
        """Write the columns path (or the text's own), label and score: a row for each class named, the best first.

        Of a language model it is the column ``generated``.

        An input that could not be read has a row without label and score.

        Raises:
            FileError: It cannot be written.
        """
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow((*self._columns, *self._outputs))
        width = len(self._outputs)
        for prediction in self.predictions:
            given = (prediction.source,) if prediction.inputs is None else tuple(prediction.inputs.values())
            for label, score in _named(prediction):
                rows.writerow((*given, *(label, "" if score is None else repr(score))[:width]))
            if prediction.error is not None:
                rows.writerow((*given, *[""] * width))
        write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))

    def __rich__(self) -> RenderableType:
        """Return a table, and what it comes to; of a language model each prompt and what comes after it."""
        if self._outputs == GENERATED:
            return Group(*map(self._gone_on, self.predictions), Text(self.summary()))
        known = any(actual is not None for actual in self.actual)
        table = Table(box=box.SIMPLE_HEAD)
        for title in (" | ".join(self._columns), *self._outputs, *(("actual",) if known else ())):
            table.add_column(title, overflow="fold", justify="right" if title == "score" else "left")
        shown = 0
        for prediction, actual in zip(self.predictions, self.actual, strict=True):
            if prediction.error is None and shown >= _MOST_ROWS:
                continue
            shown += prediction.error is None
            for cells in _rows(prediction):
                # Names as they are, without markup.
                shown_cells = (*cells[: 1 + len(self._outputs)], *((actual or "",) if known else ()))
                table.add_row(*(Text(cell) for cell in shown_cells))
        left = len(self.predictions) - self.unreadable - shown
        lines: list[RenderableType] = [table]
        if left > 0:
            lines.append(Text(f"… and {left} more: --out FILE.csv or --json has them all"))
        lines.append(Text(self.summary()))
        return Group(*lines)

    def _gone_on(self, prediction: Prediction) -> Text:
        texts = self.predictor.description.texts
        between = "\n" if texts is not None and texts.chat else ""
        (prompt, said) = readable_names([prediction.source, prediction.label or ""])
        if prediction.error is not None:
            said, between = f"cannot be gone on with: {prediction.error}", "\n"
        return Text.assemble((prompt, "bold"), between, said, "\n")

    def summary(self) -> str:
        """Return what the predictions come to, in a line."""
        parts = [f"{len(self.predictions) - self.unreadable} predicted with the {self._which()}"]
        if self.accuracy is not None:
            right = sum(self._hits)
            images = self.predictor.description.texts is None
            told_of = "of the class that they are in" if images else "right"
            parts.append(f"accuracy {self.accuracy:.1%}: {right} of {self.labelled} are {told_of}")
        parts += [told(name, value) for name, value in self.measures.items()]
        if self.unreadable:
            parts.append(f"{self.unreadable} could not be read")
        return "; ".join(parts)

    @property
    def _columns(self) -> tuple[str, ...]:
        found = next((prediction.columns for prediction in self.predictions), {"path": ""})
        return tuple(found)

    def _which(self) -> str:
        epoch = self.predictor.epoch + 1
        return f"{self.predictor.weights} weights (epoch {epoch} of {self.predictor.description.epochs})"


def _rows(prediction: Prediction) -> list[tuple[str, str, str]]:
    (source,) = readable_names([prediction.source])
    source = source if prediction.inputs is None else _shortened(source)
    if prediction.error is not None:
        (reason,) = readable_names([prediction.error])
        return [(source, f"cannot be read: {reason}", "")]
    return [
        (source if place == 0 else "", label or "(none)", "" if score is None else _shown(score))
        for place, (label, score) in enumerate(_named(prediction))
    ]


def _named(prediction: Prediction) -> tuple[tuple[str, float | None], ...]:
    if prediction.top or prediction.label is None:
        return prediction.top
    return ((prediction.label, prediction.score),)


def _shown(score: float) -> str:
    return f"{score:.1%}" if 0 <= score <= 1 else f"{score:.4g}"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
