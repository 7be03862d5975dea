"""A table as the data of a task: columns found, labels understood, texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trady.errors import DataError
from trady.training.objective import Objective
from trady.training.texts.columns import Columns, find_columns
from trady.training.texts.dataset import IDS, WIDTH, Integers, TextDataset
from trady.training.texts.description import Overflow, TextsDescription, TextTask
from trady.training.texts.labels import Labels, read_labels
from trady.training.texts.language import PLAIN_TEMPLATE, Sequences, blocks, conversations, read_chats
from trady.training.texts.objectives import Classification, MultiLabel, NextToken, Regression
from trady.training.texts.split import complete_rows, digest, held_out, limited
from trady.training.texts.tables import Table, read_tables
from trady.training.texts.tokens import Encoded, encode
from trady.training.texts.told import told_of_labels, told_of_lengths, told_of_rows, told_of_sizes

#: Tokens of a block of a language model where nobody says it.
BLOCK = 256


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        source: A file, a folder or a name on the Hub.
        evaluation: A file of rows to evaluate on.
        text_columns: Columns of the texts; found by name where empty.
        label_columns: Columns of the labels; found by name where empty.
        task: What is to be learnt; found by the labels where nobody says it.
        longest: Tokens that the model takes; ``None`` is any number.
        block: Tokens of a block of a language model.
        overflow: What becomes of a longer text.
        limit: Up to that many rows of a part, drawn with the seed.
        seed: Of the choice of rows.
    """

    source: str
    evaluation: str | None = None
    text_columns: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    task: TextTask | None = None
    longest: int | None = None
    block: int = BLOCK
    overflow: Overflow = "truncate"
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Parts:
    """What was read.

    Attributes:
        train: Texts to train on.
        evaluation: Texts to evaluate on, the longest first.
        classes: Names of the classes or labels.
        summary: A line for people.
        remarks: More lines.
    """

    train: TextDataset
    evaluation: TextDataset
    classes: tuple[str, ...]
    summary: str
    remarks: tuple[str, ...]


def read_texts(asked: Reading, tokenizer: Any) -> Parts:
    """Read a source.

    Raises:
        DataError: It cannot be read, or is no data of such a task.
    """
    train, evaluation = read_tables(asked.source, asked.evaluation)
    columns = find_columns(train, asked.text_columns, asked.label_columns, asked.task)
    for name in (*columns.texts, *columns.labels):
        if evaluation is not None and name not in evaluation.columns:
            raise DataError(
                f"{evaluation.name} has no column {name!r}, as {train.name} has; it has {', '.join(evaluation.columns)}"
            )
    parts, remarks = _prepared(asked, columns, train, evaluation)
    if columns.labels:
        return _labelled(asked, columns, tokenizer, *parts, remarks)
    return _language(asked, columns, tokenizer, *parts, remarks)


def _prepared(
    asked: Reading, columns: Columns, train: Table, evaluation: Table | None
) -> tuple[tuple[Table, Table | None], list[str]]:
    """Return the rows that are complete, up to the limit, with remarks on the others."""
    remarks = [*train.remarks, *(() if evaluation is None else evaluation.remarks)]
    found = []
    for table in (train, evaluation):
        if table is not None and not columns.chat:
            table, remark = complete_rows(table, columns.texts, columns.labels)
            remarks += [remark] if remark else []
        found.append(None if table is None else limited(table, asked.limit, asked.seed))
    assert found[0] is not None
    return (found[0], found[1]), remarks


def held_out_rows(asked: Reading, columns: Columns, table: Table, labels: Labels | None) -> tuple[Integers, Integers]:
    """Return the rows to train on and those kept for evaluation, of a source that has no part for that."""
    keys = labels.values if labels is not None and labels.values.ndim == 1 else None
    return held_out(len(table), keys, asked.seed, table.name)


# -- texts with labels ---------------------------------------------------------------------------------


def _labelled(
    asked: Reading, columns: Columns, tokenizer: Any, train: Table, evaluation: Table | None, remarks: list[str]
) -> Parts:
    labels = read_labels(train, columns.labels, asked.task)
    content = None
    if evaluation is None:
        content = digest(train, (*columns.texts, *columns.labels))
        kept, apart = held_out_rows(asked, columns, train, labels)
        tables, of_both = (
            (train.take(kept.tolist()), train.take(apart.tolist())),
            (labels.take(kept), labels.take(apart)),
        )
    else:
        tables = train, evaluation
        of_both = labels, read_labels(evaluation, columns.labels, labels.task, labels.classes)
    encoded = [encode(tokenizer, texts_of(table, columns.texts), asked.longest, asked.overflow, ()) for table in tables]
    longest = asked.longest or -(-max(int(each.lengths.max()) for each in encoded) // WIDTH) * WIDTH
    description = TextsDescription(
        labels.task,
        columns.texts,
        columns.labels,
        longest,
        asked.overflow,
        held_out=content,
        limit=asked.limit,
        seed=asked.seed,
    )
    sets = [labelled_dataset(each, own, tokenizer, description) for each, own in zip(encoded, of_both, strict=True)]
    told = (
        f"{told_of_rows(tables, content is not None)}; texts in {' and '.join(columns.texts)}, "
        f"{told_of_labels(labels, of_both[0], columns)}; {told_of_lengths(encoded, asked.longest, asked.overflow)}"
    )
    return Parts(sets[0], evaluated(sets[1]), labels.classes, told, tuple(remarks))


def texts_of(table: Table, names: Sequence[str]) -> list[list[str]]:
    """Return the texts of a table, a list for each column of them."""
    return [[str(value) for value in table.columns[name]] for name in names]


def labelled_dataset(encoded: Encoded, labels: Labels, tokenizer: Any, description: TextsDescription) -> TextDataset:
    """Return texts with their labels; the parts of a text that was cut have its label each."""
    return TextDataset(
        encoded.columns,
        paddings(tokenizer, encoded.columns),
        labels.values[encoded.rows],
        encoded.rows,
        description.longest,
        objective_for(labels.task, len(labels.classes)),
        description,
        tokenizer,
        labels.classes,
    )


def objective_for(task: TextTask, classes: int) -> Objective:
    """Return what is asked of a model by texts with labels."""
    if task == "regression":
        return Regression()
    return MultiLabel() if task == "multi-label" else Classification(classes)


def paddings(tokenizer: Any, names: Any) -> dict[str, int]:
    """Return what each column of a batch is filled up with."""
    return {
        name: tokenizer.pad_token_id or 0 if name == IDS else getattr(tokenizer, "pad_token_type_id", 0)
        for name in names
    }


def evaluated(data: TextDataset) -> TextDataset:
    """Return a data set in the order of an evaluation; texts that were cut are measured by the mean of their parts."""
    data = data.by_length()
    if len(np.unique(data.rows)) == len(data):
        return data
    return data.with_objective(type(data.objective)(**_options(data)))


def _options(data: TextDataset) -> dict[str, Any]:
    classes = {"classes": data.objective.classes} if isinstance(data.objective, Classification) else {}
    return {**classes, "rows": data.rows}


# -- texts without ---------------------------------------------------------------------------------------


def _language(
    asked: Reading, columns: Columns, tokenizer: Any, train: Table, evaluation: Table | None, remarks: list[str]
) -> Parts:
    longest = min(asked.longest or asked.block, asked.block)
    content = None
    if evaluation is None:
        content = digest(train, columns.texts)
        train, evaluation = _language_parts(asked, columns, train)
    if columns.chat:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
            remarks.append(
                "the tokenizer has no chat template: it gets a plain one, a line a message, kept with the run"
            )
        if asked.overflow == "split":
            raise DataError("--overflow split would part answers from what they answer: take truncate or error")
        found = [
            conversations(
                tokenizer, read_chats(table.columns, columns.texts), longest, refuse=asked.overflow == "error"
            )
            for table in (train, evaluation)
        ]
        remarks += [
            f"left out: {each.lost} conversations whose answer begins after {longest} tokens"
            for each in found
            if each.lost
        ]
    else:
        found = [blocks(tokenizer, texts_of(table, columns.texts)[0], longest) for table in (train, evaluation)]
    description = TextsDescription(
        "language-model",
        columns.texts,
        (),
        longest,
        asked.overflow,
        chat=columns.chat,
        held_out=content,
        limit=asked.limit,
        seed=asked.seed,
    )
    sets = [language_dataset(each, tokenizer, description) for each in found]
    tables = train, evaluation
    what = told_of_rows(tables, content is not None) if columns.chat or len(train) > 1 else asked.source
    if columns.chat:
        sizes = np.concatenate([each.lengths for each in found])
        cut = sum(each.cut for each in found)
        told = f"{what}; conversations, whose answers are learnt; {told_of_sizes(sizes, longest, cut, asked.overflow)}"
    else:
        counts = [int(each.lengths.sum()) for each in found]
        told = (
            f"{what}; {counts[0]} tokens to train on and {counts[1]} to evaluate on, in {len(sets[0])} and "
            f"{len(sets[1])} blocks of {int(sets[0].lengths[0])}"
        )
    return Parts(sets[0], sets[1].by_length(), (), told, tuple(remarks))


def _language_parts(asked: Reading, columns: Columns, table: Table) -> tuple[Table, Table]:
    """Keep a tenth of the texts for evaluation or, of a single one, its last tenth."""
    if len(table) > 1:
        kept, apart = held_out_rows(asked, columns, table, None)
        return table.take(kept.tolist()), table.take(apart.tolist())
    (name,) = columns.texts
    text = str(table.columns[name][0])
    place = text.rfind("\n", 0, len(text) - len(text) // 10) + 1 or len(text) - len(text) // 10
    return Table(table.name, {name: [text[:place]]}), Table(table.name, {name: [text[place:]]})


def language_dataset(found: Sequences, tokenizer: Any, description: TextsDescription) -> TextDataset:
    """Return sequences of tokens with the tokens to be learnt."""
    return TextDataset(
        {IDS: found.ids},
        paddings(tokenizer, (IDS,)),
        found.labels,
        np.arange(len(found.ids)),
        description.longest,
        NextToken(),
        description,
        tokenizer,
        packed=not description.chat,
    )
