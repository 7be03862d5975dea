"""A task on texts, from what was typed: the data as tokens, and the model with its head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from trady.errors import DataError
from trady.records.translated import file_errors
from trady.training.models.from_transformers import import_transformers, quiet, read_config
from trady.training.texts.columns import TASKS
from trady.training.texts.dataset import TextDataset
from trady.training.texts.description import Overflow, TextTask
from trady.training.texts.model import check_text_model, head_remark, load_text_model
from trady.training.texts.reading import BLOCK, Parts, Reading, read_texts
from trady.training.texts.tokens import load_tokenizer, longest_of, text_model_errors

OVERFLOWS: tuple[Overflow, ...] = ("truncate", "split", "error")


@dataclass(frozen=True)
class Texts:
    """A task on texts: what :func:`trady.finetune` takes.

    Attributes:
        model: The pretrained model, with a head for the classes.
        train: Texts to train on.
        evaluation: Texts to evaluate on, the longest first; never trained on.
        classes: Names of the classes or labels, in the order of the outputs; empty where there are none.
        summary: What was read, in a line for people.
        remarks: What else a person should know, a line each.
    """

    model: nn.Module = field(repr=False)
    train: TextDataset = field(repr=False)
    evaluation: TextDataset = field(repr=False)
    classes: tuple[str, ...]
    summary: str
    remarks: tuple[str, ...] = ()


def load_texts(
    source: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    evaluation: str | os.PathLike[str] | None = None,
    text_columns: str | Sequence[str] = (),
    label_columns: str | Sequence[str] = (),
    task: TextTask | None = None,
    max_length: int | None = None,
    overflow: Overflow = "truncate",
    limit: int | None = None,
    seed: int = 0,
) -> Texts:
    """Read texts by the tokenizer of a model, and the model with a head for them.

    Args:
        source: A CSV, TSV, JSON lines, Parquet or text file; a folder of such files, called ``train.*`` and, to
            evaluate on, ``validation.*``, ``dev.*`` or ``test.*``; or the name of a data set on the Hugging Face Hub.
        model: A folder or a name on the Hub, read by transformers; or a run folder, to go on from.
        evaluation: A file to evaluate on; without one, the source's own part, else a tenth of the rows.
        text_columns: The column of the texts, or the two of pairs; found by name (docs/text.md) where it is empty.
        label_columns: The column of the labels, or several of 0 and 1; likewise.
        task: ``classification``, ``regression``, ``multi-label`` or ``language-model``; by the data where ``None``.
        max_length: Tokens that a text may have, or a block of a language model; what the model takes (256 for a
            language model) by default.
        overflow: A longer text is cut off (``truncate``), taken in parts (``split``) or refused (``error``).
        limit: Up to that many rows of each part, drawn with the seed.
        seed: Of the rows that are kept for evaluation, and of a new head's weights.

    Raises:
        DataError: The source cannot be read, or is no data of such a task.
        ModelError: There is no such model, or it is none of texts.
    """
    name, apart = os.fspath(model), None if evaluation is None else os.fspath(evaluation)
    columns, labels = _several(text_columns), _several(label_columns)
    asked = Reading(os.fspath(source), apart, columns, labels, task, max_length, BLOCK, overflow, limit, seed)
    parts = read_for(name, asked)
    with file_errors():
        found = load_text_model(name, parts.train.description.task, parts.classes, parts.train.tokenizer, seed)
    head = head_remark(name, parts.classes)
    remarks = (*parts.remarks, *((head,) if head else ()))
    return Texts(found, parts.train, parts.evaluation, parts.classes, parts.summary, remarks)


def read_for(model: str, asked: Reading) -> Parts:
    """Read texts as :func:`load_texts` does, without the weights of the model.

    Args:
        model: A folder or a name on the Hub.
        asked: How; ``longest`` is what was asked for, ``None`` what the model takes, and ``block`` follows it.

    Raises:
        DataError: The source cannot be read, or is no data of such a task.
        ModelError: There is no such model, or it is none of texts.
    """
    for option, value in (("max_length", asked.longest), ("limit", asked.limit)):
        if value is not None and value < 1:
            raise DataError(f"{option} is {value}; it must be at least 1")
    if asked.overflow not in OVERFLOWS:
        raise DataError(f"overflow is {asked.overflow!r}; possible are {', '.join(OVERFLOWS)}")
    if asked.task is not None and asked.task not in TASKS:
        raise DataError(f"no task {asked.task!r}; there are {', '.join(TASKS)}")
    with file_errors():
        check_text_model(model)
        tokenizer = load_tokenizer(model)
        longest = _longest(model, tokenizer, asked.longest)
        return read_texts(replace(asked, longest=longest, block=asked.longest or BLOCK), tokenizer)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _longest(model: str, tokenizer: Any, max_length: int | None) -> int | None:
    transformers = import_transformers(model)
    with quiet(transformers), text_model_errors(model):
        possible = longest_of(tokenizer, read_config(transformers, model))
    if max_length is not None and possible is not None and max_length > possible:
        raise DataError(f"--max-length is {max_length}, and {model} takes up to {possible} tokens")
    return max_length or possible
