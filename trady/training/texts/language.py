"""What a language model learns from: text in blocks of one length, and the answers of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trady.errors import DataError
from trady.training.texts.dataset import IDS, NO_LOSS, Ragged

#: The template of a tokenizer that has none: a line a message, and the end of an answer where the tokenizer has a word
#: for it. It is kept with the run. Line ends are expressions: a template drops those that follow a block.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

#: Who answers.
ASSISTANT = "assistant"

#: What others call roles and contents.
_ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}

#: A long text is turned into tokens in pieces of about that many characters, cut at line ends.
_PIECE = 20_000


@dataclass(frozen=True)
class Sequences:
    """What a language model is trained on.

    Attributes:
        ids: Token ids.
        labels: The same where a token is to be learnt, else -100.
        lengths: Tokens of each text or conversation before it was cut.
        cut: Conversations that were longer than the model takes.
        lost: Of those, the ones whose answer was cut off altogether; they are left out.
    """

    ids: Ragged
    labels: Ragged
    lengths: np.ndarray[Any, Any]
    cut: int = 0
    lost: int = 0


def blocks(tokenizer: Any, texts: Sequence[str], longest: int) -> Sequences:
    """Put texts one after the other, and cut them into blocks of one length; what is left at the end is dropped.

    Each text begins with the tokenizer's first token and ends with its last one, where it has these.

    Raises:
        DataError: There are fewer than two tokens.
    """
    bare = tokenizer("", return_attention_mask=False)[IDS]
    begins = bare[:1] if bare and bare[0] == tokenizer.bos_token_id else []
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    lengths = []
    for text in texts:
        before = len(stream)
        stream += begins
        for piece in _pieces(text):
            stream += tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)[IDS]
        stream += ends
        lengths.append(len(stream) - before)
    if len(stream) < 2:
        raise DataError("there is no text: a language model needs two tokens at least")
    size = min(longest, len(stream))
    count = len(stream) // size
    flat = np.asarray(stream[: count * size], dtype=np.int32)
    ragged = Ragged(flat, np.arange(0, count * size + 1, size, dtype=np.int64))
    return Sequences(ragged, ragged, np.asarray(lengths, np.int64))


def _pieces(text: str) -> list[str]:
    found, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _PIECE)
        end = len(text) if end < 0 else end
        found.append(text[start:end])
        start = end
    return found


def conversations(
    tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]], longest: int, *, refuse: bool
) -> Sequences:
    """Turn conversations into tokens, of which those of the answers are learnt.

    Args:
        tokenizer: With a chat template.
        chats: Messages with ``role`` and ``content``.
        longest: Tokens that a conversation may have; what comes after is cut off.
        refuse: Refuse longer ones instead.

    Raises:
        DataError: A conversation has no answer, or is longer and ``refuse`` is set.
    """
    if not tokenizer.is_fast:
        raise DataError("conversations need a fast tokenizer, which says where its tokens are in a text")
    ids, labels, lengths, lost = [], [], [], 0
    for number, chat in enumerate(chats, start=1):
        text, spans = _rendered(tokenizer, chat, number)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens: list[int] = list(found[IDS])
        learnt = [
            token if any(start < end_ and end > begin for begin, end_ in spans) and end > start else NO_LOSS
            for token, (start, end) in zip(tokens, found["offset_mapping"], strict=True)
        ]
        lengths.append(len(tokens))
        if refuse and len(tokens) > longest:
            raise DataError(
                f"conversation {number} has {len(tokens)} tokens, and up to {longest} are taken: cut it by --overflow "
                "truncate, or allow more by --max-length"
            )
        if all(label == NO_LOSS for label in learnt[1:longest]):
            lost += 1
            continue
        ids.append(tokens[:longest])
        labels.append(learnt[:longest])
    if not ids:
        raise DataError(f"no conversation has an answer within {longest} tokens: allow more by --max-length")
    sizes = np.asarray(lengths, np.int64)
    return Sequences(Ragged.of(ids), Ragged.of(labels), sizes, int((sizes > longest).sum()), lost)


def _rendered(tokenizer: Any, chat: Sequence[Mapping[str, str]], number: int) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and where the answers are in it, each with what ends it."""
    whole: str = tokenizer.apply_chat_template(chat, tokenize=False)
    spans = []
    for at, message in enumerate(chat):
        if message["role"] != ASSISTANT:
            continue
        before: str = tokenizer.apply_chat_template(chat[:at], tokenize=False, add_generation_prompt=True)
        after: str = tokenizer.apply_chat_template(chat[: at + 1], tokenize=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"conversation {number}: the tokenizer's chat template changes what came before when a message is "
                "added, so that answers cannot be told apart; give prompt and completion in two columns"
            )
        spans.append((len(before), len(after)))
    if not spans:
        raise DataError(f"conversation {number} has no answer: no message has the role {ASSISTANT}")
    return whole, spans


def read_chats(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[list[dict[str, str]]]:
    """Return conversations as messages: of a column of them, or of a prompt and its completion.

    Raises:
        DataError: A cell is something else; the message says which.
    """
    if len(names) == 1:
        return [_messages(value, number) for number, value in enumerate(columns[names[0]], start=1)]
    found = []
    for number, (prompt, answer) in enumerate(zip(*(columns[name] for name in names), strict=True), start=1):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, number)
        said = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else _messages(answer, number)
        found.append([*asked, *said])
    return found


def _messages(value: Any, number: int) -> list[dict[str, str]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"conversation {number} is {value!r:.60}, not a list of messages with role and content")
    found = []
    for message in value:
        given = message if isinstance(message, Mapping) else {}
        role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"conversation {number} has the message {message!r:.60}, which lacks a role or a content")
        found.append({"role": _ROLES.get(role, role), "content": content})
    return found
