"""The model of a task on texts, with a head for its classes: of a folder, the Hub, or a run that it goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trady.errors import ModelError
from trady.training.description import is_run, read_description
from trady.training.models.from_run import going_on, new_head
from trady.training.models.from_transformers import TRANSFORMERS, import_transformers, quiet, read_config
from trady.training.models.source import source_of
from trady.training.randomness import own_randomness
from trady.training.texts.description import TextTask
from trady.training.texts.tokens import text_model_errors

#: How transformers calls what a classifier's outputs are.
_PROBLEMS = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}


def load_text_model(name: str, task: TextTask, classes: tuple[str, ...], tokenizer: Any, seed: int) -> nn.Module:
    """Return a pretrained model with a head for these classes.

    Args:
        name: A folder or a name on the Hub; or a run.
        task: What it is to learn.
        classes: Names of the classes or labels; empty for a regression and a language model.
        tokenizer: Its tokenizer, which decides about padding.
        seed: Of a new head's weights.

    Raises:
        ModelError: There is no such model, or it cannot learn such a task.
    """
    with own_randomness():
        torch.manual_seed(seed)
        model = _of_run(name, task, classes) if is_run(name) else _pretrained(name, task, classes)
    config: Any = model.config
    text = config.get_text_config()
    if tokenizer.pad_token_id is not None:
        for each in {id(config): config, id(text): text}.values():
            if getattr(each, "pad_token_id", None) is None or task != "language-model":
                each.pad_token_id = tokenizer.pad_token_id
    if task != "language-model":
        config.problem_type = _PROBLEMS[task]
        if classes:
            config.id2label = dict(enumerate(classes))
            config.label2id = {label: number for number, label in enumerate(classes)}
    else:
        _check_causal(name, model)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > vocabulary:
        raise ModelError(f"{name} has {vocabulary} token embeddings, and its tokenizer {len(tokenizer)} tokens")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a training step has no use for keys and values of the past
    return model


def head_remark(name: str, classes: tuple[str, ...]) -> str | None:
    """Say why a model that goes on from a run gets a new head; ``None`` where it keeps the run's, or is of no run."""
    return new_head(name, classes) if is_run(name) and classes else None


def check_text_model(name: str) -> None:
    """Refuse what is no model of transformers, and a run on images.

    Raises:
        ModelError: It is one.
    """
    if not is_run(name) and source_of(name) is not TRANSFORMERS:
        raise ModelError(
            f"{name} is no model of texts: name a folder or a name on the Hub that transformers can read, or a run on "
            "texts. A model of your own is trained on texts from Python: trady.finetune(model, …)"
        )
    if is_run(name) and (found := read_description(name)).texts is None:
        what = "images" if found.images is not None else "data that trady did not read"
        raise ModelError(f"{name} is a run on {what}, and the data are texts: name a model of texts, or a run on texts")


def _of_run(name: str, task: TextTask, classes: tuple[str, ...]) -> nn.Module:
    texts = read_description(name).texts
    if texts is None or texts.task != task:
        # Its weights, below the head of another task; what they are is checked as for any run.
        going_on(Path(name), None, same_head=True)
        return _pretrained(name, task, classes)
    same = task in ("language-model", "regression") or new_head(name, classes) is None
    return going_on(Path(name), len(classes) or None, same_head=same)


def _pretrained(name: str, task: TextTask, classes: tuple[str, ...]) -> nn.Module:
    transformers = import_transformers(name)
    with quiet(transformers), text_model_errors(name):
        config = read_config(transformers, name)
        if task == "language-model":
            if getattr(config, "is_encoder_decoder", False):
                raise ModelError(
                    f"{name} reads one text and writes another ({config.model_type}), which trady does not train from "
                    "the command line: take a model that continues a text, such as a GPT or Llama, or give the data "
                    "labels"
                )
            model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
            return model
        found: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(classes) or 1, ignore_mismatched_sizes=True, trust_remote_code=False
        )
        return found


@torch.no_grad()
def _check_causal(name: str, model: nn.Module) -> None:
    """Refuse a model that sees what comes next: it would learn to copy it."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    ids = ids.clamp(max=int(model.get_input_embeddings().weight.shape[0]) - 1)  # type: ignore[operator]
    scores = model(input_ids=ids).logits.float()
    model.train(was_training)
    if not torch.allclose(scores[0, 0], scores[1, 0], atol=1e-4, rtol=1e-3):
        kind = model.config.model_type  # type: ignore[union-attr]
        raise ModelError(
            f"{name} ({kind}) sees a text from both sides, and a language model here continues one: take a model such "
            "as a GPT or Llama, or give the texts labels (--label-column) to classify them"
        )
