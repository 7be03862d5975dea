"""Looks at the training data of a transformers-like trainer, and takes none of it away.

A sample is read by its index, so that no iterator moves; the generators of collators and samplers are put back, and so
is what a trainer counts. Data without indices is left alone: it may be there once only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trady.errors import TrainingError
from trady.integrations.generated import generates, longest_generated
from trady.integrations.lengths import BATCHES, largest_choices, lengths_of
from trady.integrations.recording import Pass, recorded
from trady.model.python_state import reading_state
from trady.model.untouched import untouched
from trady.training.randomness import own_randomness

#: What a trainer holds that a forward pass does not change, or that is large.
_LEFT_ALONE = {
    "model", "model_wrapped", "train_dataset", "eval_dataset", "args", "accelerator", "callback_handler", "optimizer",
    "lr_scheduler", "processing_class", "control", "state", "ref_model", "_memory_tracker",
}  # fmt: skip


def passes_of(trainer: Any, model: nn.Module, inputs: Any, items: Any, *, only_first: bool = False) -> list[Pass]:
    """Return the forward passes of one training step on inputs that are prepared; nothing is changed.

    Args:
        trainer: The trainer, whose ``compute_loss`` is run, without gradients.
        model: The model as its loop has it, maybe wrapped.
        inputs: What ``compute_loss`` gets.
        items: What the trainer normalises the loss by.
        only_first: Stop at the first pass.
    """
    attributes = dict(vars(trainer))
    roots = [value for name, value in attributes.items() if name not in _LEFT_ALONE and not isinstance(value, Tensor)]
    given = dict(inputs) if isinstance(inputs, Mapping) else inputs
    was_training = model.training
    # A pass stopped at its first module writes to nothing.
    apart = nullcontext() if only_first else untouched(trainer.model, *roots)
    try:
        with own_randomness(), apart, recorded(trainer.model, only_first=only_first) as passes, torch.enable_grad():
            model.train()
            with getattr(trainer, "compute_loss_context_manager", nullcontext)():
                trainer.compute_loss(model, given, num_items_in_batch=items)
    finally:
        model.train(was_training)
        for name in [name for name in vars(trainer) if name not in attributes]:
            delattr(trainer, name)
        vars(trainer).update(attributes)
    return passes


def longest_inputs(trainer: Any, prepared: Any) -> list[Any]:
    """Return inputs of the largest batch that training will see, as far as the lengths of the samples tell.

    Empty where samples cannot be read by an index, or are no mappings, and nothing is generated.

    Args:
        trainer: The trainer.
        prepared: The inputs of a step: where they were generated, the data has prompts only.
    """
    with _loader_of(trainer) as loader:
        data, size = loader.dataset, getattr(loader, "batch_size", None) or trainer.args.train_batch_size
        by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) > 0
        if generates(trainer):
            return longest_generated(trainer, prepared, data if by_index else None)
        if not by_index:
            return []
        lengths, text = lengths_of(data, BATCHES * size)
        if not lengths.any():
            return []
        choices = largest_choices(lengths, size, text=text)
        found = [_collated(trainer, loader, [data[index] for index in choice]) for choice in choices]
        return [max(found, key=_elements)]


def _elements(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return inputs.numel()
    inside = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (list, tuple)) else ()
    return sum(map(_elements, inside))


def inputs_by_index(trainer: Any, count: int) -> list[Any] | None:
    """Return the inputs of batches in the order of a fresh loader; ``None`` for data without indices."""
    with _loader_of(trainer) as loader:
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is None or not hasattr(loader.dataset, "__getitem__") or generates(trainer):
            return None
        data = loader.dataset
        return [_collated(trainer, loader, [data[i] for i in indices]) for indices in islice(iter(sampler), count)]


def _collated(trainer: Any, loader: Any, samples: list[Any]) -> Any:
    return trainer._prepare_inputs(loader.collate_fn(samples))


@contextmanager
def _loader_of(trainer: Any) -> Iterator[Any]:
    """A fresh loader of the training data; generators are where they were afterwards."""
    accelerator = trainer.accelerator
    known = len(accelerator._dataloaders)
    state = reading_state([getattr(trainer, "data_collator", None), getattr(trainer, "train_dataset", None)])
    with own_randomness():
        try:
            yield trainer.get_train_dataloader()
        finally:
            del accelerator._dataloaders[known:]
            state.restore()


def own_loss(output: Any, _: None) -> Tensor:
    """Return the loss that a model has computed itself.

    Raises:
        TrainingError: It has none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    if not isinstance(loss, Tensor) or loss.dim():
        raise TrainingError(
            "this policy measures gradients of the loss that the model returns, and it returns none: choose one that "
            "measures nothing (trady, trady+, dynamic-random), or give the batches labels"
        )
    return loss
