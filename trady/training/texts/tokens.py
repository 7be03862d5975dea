"""Texts as token ids, by a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trady.errors import DataError, ModelError
from trady.training.models.from_transformers import hub_errors, import_transformers, quiet, read_config
from trady.training.texts.dataset import IDS, Integers, Ragged
from trady.training.texts.description import Overflow

#: Tokenizers that know no limit say a number above this.
_NO_LIMIT = 10**6

#: Models whose positions begin behind that of the padding.
_OFFSET_POSITIONS = ("roberta", "camembert", "longformer", "mpnet", "data2vec-text")

#: Texts that are turned into tokens at once.
_AT_ONCE = 1000

#: Numbers of rows in a message.
_SHOWN = 5

#: Of a text that is cut, the share of each part that is in the part before as well.
_OVERLAP = 1 / 8


@dataclass(frozen=True)
class Encoded:
    """Texts as tokens.

    Attributes:
        columns: What the model is given, by name.
        rows: Of each example, the number of its text.
        lengths: Tokens of each text before it was cut.
        cut: How many texts were longer than the model takes.
    """

    columns: dict[str, Ragged]
    rows: Integers
    lengths: Integers
    cut: int


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model, which can pad.

    Raises:
        ModelError: There is none; the message says what the model is, where it is one of images.
    """
    transformers = import_transformers(model)
    with quiet(transformers), text_model_errors(model):
        config = read_config(transformers, model)
        if not hasattr(config.get_text_config(), "vocab_size"):
            raise ModelError(f"{model} is a model of images ({config.model_type}), and the data are texts")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ModelError(_no_tokenizer(model, str(error).strip().partition("\n")[0])) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made of nothing, where its files are missing
        raise ModelError(_no_tokenizer(model, "its tokenizer knows no word"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _no_tokenizer(model: str, reason: str) -> str:
    return (
        f"{model} has no tokenizer that transformers can read ({reason}): put its tokenizer.json and "
        "tokenizer_config.json beside config.json"
    )


def text_model_errors(model: str) -> AbstractContextManager[None]:
    """Turn what transformers raises for the name of a model into a ``ModelError``."""
    return hub_errors(model, "model of texts", "runs on texts, and folders and Hub names that transformers can read")


def longest_of(tokenizer: Any, config: Any) -> int | None:
    """Return the most tokens that a model takes, by tokenizer and configuration; ``None`` where neither says."""
    text = config.get_text_config()
    found = [limit for limit in (getattr(tokenizer, "model_max_length", None),) if limit and limit < _NO_LIMIT]
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if isinstance(positions, int) and positions > 0:
        if any(kind in text.model_type for kind in _OFFSET_POSITIONS):
            positions -= (getattr(text, "pad_token_id", None) or 0) + 1
        found.append(positions)
    return int(min(found)) if found else None


def encode(
    tokenizer: Any, texts: Sequence[Sequence[str]], longest: int | None, overflow: Overflow, names: Sequence[str] = ()
) -> Encoded:
    """Turn texts, or pairs of them, into tokens.

    Args:
        tokenizer: Of the model.
        texts: One sequence of texts, or two for pairs.
        longest: Tokens that an example may have; ``None`` is any number.
        overflow: What becomes of a longer text.
        names: What messages call the texts; by their number where empty.

    Raises:
        DataError: A text is longer and ``overflow`` is ``error``; or pairs are to be split.
    """
    if overflow == "split" and len(texts) > 1:
        raise DataError("--overflow split cuts single texts; of a pair it is not known where: take truncate or error")
    count = len(texts[0])
    columns: dict[str, list[list[int]]] = {}
    rows: list[int] = []
    lengths = np.zeros(count, np.int64)
    for start in range(0, count, _AT_ONCE):
        part = [list(each[start : start + _AT_ONCE]) for each in texts]
        found = _tokens(tokenizer, part)
        sizes = [len(ids) for ids in found[IDS]]
        lengths[start : start + len(sizes)] = sizes
        long = [at for at, size in enumerate(sizes) if longest is not None and size > longest]
        if long and overflow == "error":
            _refuse(long, start, sizes, longest, names)
        numbers = [[at] for at in range(len(sizes))]
        if long:
            cut = _cut(tokenizer, [[each[at] for at in long] for each in part], longest, overflow)
            for name in found:
                for at, pieces in zip(long, cut[name], strict=True):
                    found[name][at] = pieces
            for at in range(len(sizes)):
                if at not in set(long):
                    for name in found:
                        found[name][at] = [found[name][at]]
            numbers = [[at] * len(found[IDS][at]) for at in range(len(sizes))]
            found = {name: [piece for pieces in each for piece in pieces] for name, each in found.items()}
        for name, values in found.items():
            columns.setdefault(name, []).extend(values)
        rows.extend(start + at for several in numbers for at in several)
    ragged = {name: Ragged.of(values) for name, values in columns.items()}
    return Encoded(ragged, np.asarray(rows, np.int64), lengths, int((lengths > (longest or np.inf)).sum()))


def _tokens(tokenizer: Any, texts: Sequence[Sequence[str]], **options: Any) -> dict[str, list[Any]]:
    found = tokenizer(*texts, return_attention_mask=False, verbose=False, **options)
    return {name: list(found[name]) for name in (IDS, "token_type_ids") if name in found}


def _cut(
    tokenizer: Any, texts: Sequence[Sequence[str]], longest: int | None, overflow: Overflow
) -> dict[str, list[list[list[int]]]]:
    """Return, for each text, the pieces that it is cut into: one, or as many as it takes."""
    assert longest is not None
    if overflow == "truncate":
        found = _tokens(tokenizer, texts, truncation=True, max_length=longest)
        return {name: [[value] for value in values] for name, values in found.items()}
    if not tokenizer.is_fast:
        raise DataError("--overflow split needs a fast tokenizer, and the model has none: take truncate or error")
    stride = int(longest * _OVERLAP)
    encoded = tokenizer(
        texts[0],
        truncation=True,
        max_length=longest,
        stride=stride,
        return_overflowing_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    places = encoded["overflow_to_sample_mapping"]
    names = [name for name in (IDS, "token_type_ids") if name in encoded]
    pieces: dict[str, list[list[list[int]]]] = {name: [[] for _ in texts[0]] for name in names}
    for name in names:
        for at, value in zip(places, encoded[name], strict=True):
            pieces[name][at].append(value)
    return pieces


def _refuse(long: Sequence[int], start: int, sizes: Sequence[int], longest: int | None, names: Sequence[str]) -> None:
    shown = [names[start + at] if names else f"row {start + at + 1}" for at in long[:_SHOWN]]
    more = ", …" if len(long) > _SHOWN else ""
    at_least = "at least " if len(sizes) == _AT_ONCE else ""
    raise DataError(
        f"{at_least}{len(long)} texts are longer than {longest} tokens ({', '.join(shown)}{more}; the longest has "
        f"{max(sizes)}): cut them by --overflow truncate, take them in parts by --overflow split, or allow more by "
        "--max-length"
    )
