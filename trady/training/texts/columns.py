"""Which columns of a table are texts and labels, and what a model is to learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from trady.errors import DataError
from trady.training.texts.description import TextTask
from trady.training.texts.names import COMPLETIONS, LABELS, MESSAGES, PAIRS, TAGS, TEXTS
from trady.training.texts.tables import Table

#: The command line's words.
TASKS: tuple[TextTask, ...] = ("classification", "regression", "multi-label", "language-model")


@dataclass(frozen=True)
class Columns:
    """What a table is read as.

    Attributes:
        texts: The column of the texts, or the two of a pair.
        labels: That of the labels, or one for each of several; empty where there are none.
        chat: Whether the texts are conversations.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    chat: bool = False


def find_columns(
    table: Table, text_columns: Sequence[str] = (), label_columns: Sequence[str] = (), task: TextTask | None = None
) -> Columns:
    """Find the columns by what they are called, or by what somebody says.

    Args:
        table: The table.
        text_columns: One, or the two of a pair; found by name where empty.
        label_columns: One, or several of 0 and 1; found by name where empty.
        task: What is to be learnt; a language model needs no labels.

    Raises:
        DataError: There is no such column, or none of a known name; the message shows those that there are.
    """
    names = list(table.columns)
    for name, option in (
        *((n, "--text-column") for n in text_columns),
        *((n, "--label-column") for n in label_columns),
    ):
        if name not in names:
            near = get_close_matches(name, names, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"{table.name} has no column {name!r} ({option}); it has {', '.join(names)}.{meant}")
    if len(text_columns) > 2:
        raise DataError(f"a text is in one column or in two, not in {len(text_columns)}: {', '.join(text_columns)}")
    if tagged := [name for name in names if name.lower() in TAGS]:
        raise DataError(
            f"{table.name} has a label for each word ({tagged[0]}), and trady does not train on those from the command "
            "line: take a Trainer of transformers with trady.tune (docs/trainers.md)"
        )
    by_name = {name.strip().lower(): name for name in reversed(names)}
    language = task == "language-model"
    labels = tuple(label_columns) or (() if language else _known(by_name, ((name,) for name in LABELS)))
    chat = _known(by_name, (*((name,) for name in MESSAGES), *COMPLETIONS))
    if chat and not labels and not text_columns:
        return Columns(chat, (), chat=True)
    texts = tuple(text_columns) or _known(by_name, (*PAIRS, *((name,) for name in TEXTS)), labels)
    if not texts:
        known = ", ".join((*TEXTS, *(" and ".join(pair) for pair in PAIRS)))
        raise DataError(
            f"{table.name} has no column of texts that trady knows by name ({known}); it has {', '.join(names)}. "
            "Say which: --text-column NAME, twice for a pair"
        )
    if not labels and task not in (None, "language-model"):
        raise DataError(
            f"{table.name} has no column of labels that trady knows by name ({', '.join(LABELS)}); it has "
            f"{', '.join(names)}. Say which: --label-column NAME"
        )
    if not labels and len(texts) == 2:
        raise DataError(
            f"{table.name} has pairs of texts ({' and '.join(texts)}) and no column of labels that trady knows by name "
            f"({', '.join(LABELS)}); it has {', '.join(names)}. Say which: --label-column NAME"
        )
    if not labels and len(names) > 1 and task is None:
        raise DataError(
            f"{table.name} has no column of labels that trady knows by name ({', '.join(LABELS)}); it has "
            f"{', '.join(names)}. Say which: --label-column NAME. Or train a language model on {texts[0]}: "
            "--task language-model"
        )
    return Columns(texts, labels)


def _known(by_name: dict[str, str], candidates: object, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the first of these that are all there."""
    assert not isinstance(candidates, str)
    for names in candidates:  # type: ignore[attr-defined]
        found = tuple(by_name[name] for name in names if name in by_name)
        if len(found) == len(names) and not set(found) & set(others):
            return found
    return ()
