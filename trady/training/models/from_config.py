"""Models from their configuration alone: shapes without weights, enough to plan with."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trady.errors import ModelError
from trady.training.models.from_transformers import hub_errors, import_transformers, preprocessing, quiet, read_config

#: Dtypes by the names that a user types.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Class of transformers by how a name in ``architectures`` ends.
_TASKS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}

#: Token ids are drawn below this, and above 0, which is often the padding.
_LARGEST_ID = 1000


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: its tensors have shapes but no memory.

    Attributes:
        model: The model, on the meta device.
        vocabulary: Number of its tokens; ``None`` for a model of images.
        makes_loss: Whether it computes its own loss, from ``labels`` among its inputs.
        image_size: Height and width of its images.
        dtype: Of its weights.
    """

    model: nn.Module
    vocabulary: int | None
    makes_loss: bool
    image_size: int
    dtype: torch.dtype


def read_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of that name.

    Raises:
        ModelError: There is no such dtype.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise ModelError(f"no dtype {name!r}; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def read_tokens(text: str) -> tuple[int, int]:
    """Read ``BATCHxLENGTH``.

    Raises:
        ModelError: It is no such text.
    """
    match = re.fullmatch(r"\s*([1-9][0-9]{0,6})\s*[xX×]\s*([1-9][0-9]{0,6})\s*", text)
    if match is None:
        raise ModelError(f"tokens {text!r} cannot be read; type sequences and their length, e.g. 4x1024")
    return int(match[1]), int(match[2])


def skeleton(
    name: str,
    num_classes: int,
    *,
    tokens: bool,
    length: int | None,
    dtype: torch.dtype | None,
    generates: bool | None = None,
) -> Skeleton:
    """Build a model of transformers from its configuration; its weights are neither read nor allocated.

    Args:
        name: A folder, a file ``config.json`` or a name on the Hugging Face Hub.
        num_classes: Outputs of a classifier.
        tokens: Whether it is to be given ids of tokens.
        length: Of a sequence of tokens.
        dtype: Of the weights; that of the configuration by default.
        generates: Whether a model of text is to be a language model or a classifier; by its configuration by default.

    Raises:
        ModelError: There is no such configuration, or the model takes something else.
    """
    transformers = import_transformers(name)
    with quiet(transformers), hub_errors(name):
        config = read_config(transformers, name)
        task = _task(config, tokens)
        if generates is not None:
            task = "AutoModelForCausalLM" if generates else "AutoModelForSequenceClassification"
        classifies = task != "AutoModelForCausalLM"
        _refuse_other_inputs(name, task, tokens, length, config)
    with quiet(transformers), hub_errors(name):
        key = "dtype" if hasattr(config, "dtype") else "torch_dtype"
        wanted = dtype or getattr(config, key, None) or torch.float32
        setattr(config, key, wanted)
        if classifies:
            config.num_labels = num_classes
        if tokens:
            config.use_cache = False  # a training step has no use for keys and values of the past
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = 0
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, task).from_config(config, trust_remote_code=False)
        image_size = 0 if tokens else preprocessing(transformers, name, config)[1]
    vocabulary = int(config.get_text_config().vocab_size) if tokens else None
    return Skeleton(model, vocabulary, not classifies, image_size, wanted)


def longest_text(name: str) -> int | None:
    """Return the most tokens that a model of text takes, by its configuration; ``None`` for a model of images.

    Raises:
        ModelError: There is no such configuration.
    """
    transformers = import_transformers(name)
    with quiet(transformers), hub_errors(name):
        config = read_config(transformers, name)
    if not hasattr(config, "vocab_size"):
        return None
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) else sys.maxsize


def token_batch(found: Skeleton, sequences: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Draw a batch of token ids without padding, with labels for a model that computes its own loss."""
    assert found.vocabulary is not None
    generator = torch.Generator().manual_seed(seed)
    end = max(2, min(found.vocabulary, _LARGEST_ID))
    ids = torch.randint(1, end, (sequences, length), generator=generator)
    return {"input_ids": ids, "labels": ids} if found.makes_loss else {"input_ids": ids}


def _task(config: Any, tokens: bool) -> str:
    for architecture in getattr(config, "architectures", None) or ():
        for ending, task in _TASKS.items():
            if architecture.endswith(ending):
                return task
    return "AutoModelForSequenceClassification" if tokens else "AutoModelForImageClassification"


def _refuse_other_inputs(name: str, task: str, tokens: bool, length: int | None, config: Any) -> None:
    kind = config.model_type
    if tokens and task == "AutoModelForImageClassification":
        raise ModelError(f"{name} is a model of images ({kind}): give --image-size and --batch-size, not --tokens")
    if not tokens and (task != "AutoModelForImageClassification" or hasattr(config, "vocab_size")):
        raise ModelError(f"{name} is a model of text ({kind}): give the batch as --tokens BATCHxLENGTH, e.g. 4x1024")
    longest = getattr(config, "max_position_embeddings", None)
    if length is not None and isinstance(longest, int) and length > longest:
        raise ModelError(f"{name} takes at most {longest} tokens, and --tokens asks for {length}")
