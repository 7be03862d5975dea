"""What columns of texts and labels are usually called."""

from __future__ import annotations

#: Columns with the two texts of a pair, by name.
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "answer"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)

#: Columns with a text.
TEXTS = ("text", "sentence", "content", "review", "comment", "tweet", "document", "title")

#: Columns with a label.
LABELS = ("label", "labels", "target", "class", "category", "sentiment", "score", "rating", "stars")

#: A conversation, as a list of messages; or in two columns, of which the second one is to be learnt.
MESSAGES = ("messages", "conversations")
COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))

#: Columns with a label for each word.
TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "token_labels")

#: Names by which the first line of a table is known for a header.
HEADER_WORDS = frozenset(
    {"id", "idx", "index", *TEXTS, *LABELS, *MESSAGES, *(name for pair in (*PAIRS, *COMPLETIONS) for name in pair)}
)
