"""Texts whose label one word decides, and small models of transformers with tokenizers that know these words."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = {"bad": ("awful", "dull", "weak"), "good": ("fine", "grand", "warm"), "odd": ("queer", "strange", "weird")}
FILLER = ("a", "the", "film", "story", "is", "was", "and", "very", "of", "it", "with", "plot", "no", "one")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>")


def sentences(count: int, seed: int, classes: Sequence[str] = ("bad", "good")) -> list[tuple[str, str]]:
    """Sentences of 4 to 14 words, of which those of the class say it: half of them, three at least."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        label = classes[number % len(classes)]
        filler = rng.choice(FILLER, rng.integers(1, 8)).tolist()
        words = [*filler, *rng.choice(WORDS[label], max(3, len(filler))).tolist()]
        rng.shuffle(words)
        found.append((" ".join(words), label))
    return found


def write_table(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows] if header else rows)
    return path


def _words_tokenizer(ends: tuple[str, str], single: str, pair: str, **more: str) -> Any:
    import tokenizers
    import transformers

    known = [*SPECIAL, *FILLER, *(word for words in WORDS.values() for word in words), "user", "assistant", ":", "\n"]
    model = tokenizers.models.WordLevel({word: at for at, word in enumerate(known)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split("\n", "isolated"),
            tokenizers.pre_tokenizers.Split(":", "isolated"),
            tokenizers.pre_tokenizers.Split(" ", "removed"),
        ]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, known.index(name)) for name in ends]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **more
    )


def bert_folder(folder: Path, **changed: Any) -> Path:
    """A BERT of two layers with a tokenizer of words; it takes 32 tokens."""
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options = {"vocab_size": 40, "max_position_embeddings": 32, "initializer_range": 0.3, **small, **changed}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformers.BertModel(transformers.BertConfig(**options)).save_pretrained(folder)
    _words_tokenizer(
        ("[CLS]", "[SEP]"),
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],  # type: ignore[arg-type]
    ).save_pretrained(folder)
    return folder


def llama_folder(folder: Path, **changed: Any) -> Path:
    """A Llama of two layers with a tokenizer of words; it takes 64 tokens."""
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options = {
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "bos_token_id": 4,
        "eos_token_id": 5,
        **small,
        **changed,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).save_pretrained(folder)
    _words_tokenizer(
        ("<s>",),  # type: ignore[arg-type]
        "<s> $A",
        "<s> $A $B",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
    return folder
