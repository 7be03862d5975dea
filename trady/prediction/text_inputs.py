"""What was typed after ``trady predict RUN``, of a run on texts: tables, lines, or texts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trady.errors import DataError
from trady.training.description import RunDescription
from trady.training.texts.columns import Columns
from trady.training.texts.description import TextsDescription
from trady.training.texts.labels import Labels, is_missing, read_labels
from trady.training.texts.reading import Reading, held_out_rows, texts_of
from trady.training.texts.split import complete_rows, digest, limited
from trady.training.texts.tables import BUILDERS, Table, read_file, read_lines, read_tables

#: Standard input.
STDIN = "-"


@dataclass
class TextInputs:
    """Texts in their order.

    Attributes:
        sources: Texts, or pairs of them.
        labels: Of each, where all of a source's are known: class numbers, numbers, or rows of 0 and 1.
        remarks: What a person should know about how they were found.
    """

    sources: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def add(self, texts: Sequence[Any], labels: Sequence[Any] | None = None) -> None:
        """Append texts, with what is right where it is known."""
        self.sources.extend(texts)
        self.labels.extend([None] * len(texts) if labels is None else labels)


def find_texts(given: Sequence[str], description: RunDescription, stdin: str | None) -> TextInputs:
    """Find the texts.

    Args:
        given: Tables; ``-``, whose lines are texts; or texts themselves, of a run on pairs two for each.
        description: Of the run.
        stdin: What came on standard input.

    Raises:
        DataError: Something is not there, or holds no texts.
    """
    texts = description.texts
    assert texts is not None
    found, typed = TextInputs(), []
    for source in given:
        path = Path(source)
        if source == STDIN:
            found.add(_of_stdin(stdin or "", texts))
        elif _is_file(source) and (path.suffix.lower() in BUILDERS or path.is_dir()):
            _add_table(found, source, texts, description)
        elif _is_file(source):
            raise DataError(
                f"{source} is no table of texts, and the run takes texts: give one as {', '.join(BUILDERS)}, a text in "
                "quotes, or - for standard input"
            )
        elif path.suffix.lower() in BUILDERS and not any(character.isspace() for character in source):
            raise DataError(
                f"{source} does not exist; give a table of texts, a text in quotes, or - for standard input"
            )
        else:
            typed.append(source)
    columns = len(texts.text_columns)
    if texts.chat or columns == 1:
        found.add(typed)
    elif len(typed) % columns:
        names = " and ".join(texts.text_columns)
        raise DataError(f"the run takes pairs of texts ({names}): give two for each, and these are {len(typed)}")
    else:
        found.add(list(zip(typed[::2], typed[1::2], strict=True)))
    if not found.sources:
        raise DataError("there is no text to predict")
    return found


def _is_file(source: str) -> bool:
    try:
        return bool(source.strip()) and Path(source).exists()
    except OSError:  # longer than a path can be
        return False


def _of_stdin(text: str, texts: TextsDescription) -> list[Any]:
    if texts.task == "language-model":
        return [text.rstrip("\n")]
    lines = list(read_lines("standard input", text).columns["text"])
    if len(texts.text_columns) == 1:
        return lines
    pairs = [tuple(line.split("\t")) for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError("the run takes pairs of texts: give them on standard input a pair a line, with a tab between")
    return pairs


def _add_table(found: TextInputs, source: str, texts: TextsDescription, description: RunDescription) -> None:
    table, apart = read_tables(source) if Path(source).is_dir() else (read_file(Path(source)), None)
    if apart is not None:
        found.remarks.append(f"{source} has a part to evaluate on: {apart.name} is taken, which was not trained on")
        table = apart
    if Path(source).suffix.lower() == ".txt":
        table = read_lines(source, str(table.columns["text"][0]))
    found.remarks += table.remarks
    names = texts.text_columns[:1] if texts.chat else texts.text_columns
    if list(table.columns) == ["text"] and len(names) == 1:
        table = Table(table.name, {names[0]: table.columns["text"]})
    if missing := [name for name in names if name not in table.columns]:
        raise DataError(
            f"{table.name} has no column {missing[0]!r}, which the run takes its texts from; it has "
            f"{', '.join(table.columns)}"
        )
    if texts.task == "language-model":
        found.add([_prompt(value) for value in table.columns[names[0]]])
        return
    if texts.held_out is not None and (kept := _kept_apart(table, texts, description)) is not None:
        table = kept
        found.remarks.append(
            f"{source} is what the run was trained on: the {len(table)} rows are taken that it has kept to evaluate on"
        )
    columns = texts_of(Table("", {n: ["" if is_missing(v) else v for v in table.columns[n]] for n in names}), names)
    rows = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    labels = _labels(found, table, texts, description)
    found.add(rows, labels)


def _prompt(value: Any) -> Any:
    """Return the prompt of a row: of a conversation, what was asked first."""
    if isinstance(value, (list, tuple)):
        asked = (message for message in value if isinstance(message, dict))
        return next((message.get("content", message.get("value")) for message in asked), "")
    return "" if is_missing(value) else str(value)


def _labels(
    found: TextInputs, table: Table, texts: TextsDescription, description: RunDescription
) -> Sequence[Any] | None:
    names = texts.label_columns
    if any(name not in table.columns for name in names):
        return None
    if any(is_missing(value) for name in names for value in table.columns[name]):
        found.remarks.append(f"{table.name} has rows without a label in {' and '.join(names)}: none is compared")
        return None
    try:
        labels = read_labels(table, names, texts.task, description.classes)
    except DataError as error:
        found.remarks.append(f"labels are not compared: {error}")
        return None
    return list(labels.values)


def _kept_apart(table: Table, texts: TextsDescription, description: RunDescription) -> Table | None:
    """Return the rows of a source that its run has kept for evaluation; ``None`` where it is another one."""
    names = (*texts.text_columns, *texts.label_columns)
    if any(name not in table.columns for name in names):
        return None
    rows = limited(complete_rows(table, texts.text_columns, texts.label_columns)[0], texts.limit, texts.seed)
    if digest(rows, names) != texts.held_out:
        return None
    labels: Labels = read_labels(rows, texts.label_columns, texts.task, description.classes)
    asked = Reading(table.name, seed=texts.seed)
    apart = held_out_rows(asked, Columns(texts.text_columns, texts.label_columns), rows, labels)[1]
    return rows.take(np.asarray(apart).tolist())
