"""Looks at the training data of a transformers-like trainer, and takes none of it away.

A sample is read by its index, so that no iterator moves; the generators of collators and samplers are put back, and so
is what a trainer counts. Data without indices is left alone: it may be there once only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trady.errors import TrainingError
from trady.integrations.recording import Pass, recorded
from trady.model.python_state import PythonState
from trady.model.untouched import untouched
from trady.training.randomness import own_randomness

#: Samples that are looked at for their lengths where no column tells, in batches.
BATCHES = 8
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


def longest_inputs(trainer: Any) -> list[Any]:
    """Return inputs of the largest batches that training will see, as far as the lengths of the samples tell.

    Those with the largest sum of all lengths, and those with the longest single one (a pair is padded to its longer
    half). Empty where samples cannot be read by an index, or are no mappings.
    """
    if hasattr(trainer, "_generate_and_score_completions"):
        return []  # what it trains on is generated: the data has prompts only
    with _loader_of(trainer) as loader:
        data, size = loader.dataset, getattr(loader, "batch_size", None) or trainer.args.train_batch_size
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
            return []
        lengths = list(_lengths(data, BATCHES * size))
        if not lengths or not any(lengths):
            return []
        found: list[list[int]] = []
        for key in (sum, max):
            measured = [key(each) if each else 0 for each in lengths]
            chosen = sorted(range(len(measured)), key=measured.__getitem__, reverse=True)[:size]
            if sorted(chosen) not in [sorted(other) for other in found]:
                found.append(chosen)
        return [_collated(trainer, loader, [data[index] for index in chosen]) for chosen in found]


def inputs_by_index(trainer: Any, count: int) -> list[Any] | None:
    """Return the inputs of batches in the order of a fresh loader; ``None`` for data without indices."""
    with _loader_of(trainer) as loader:
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is None or not hasattr(loader.dataset, "__getitem__") or hasattr(trainer, "_buffered_inputs"):
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
    roots = [getattr(trainer, "data_collator", None), getattr(trainer, "train_dataset", None)]
    state = PythonState([root for root in roots if not isinstance(root, (list, Tensor))])
    with own_randomness():
        try:
            yield trainer.get_train_dataloader()
        finally:
            del accelerator._dataloaders[known:]
            state.restore()


def _lengths(data: Any, at_most: int) -> Iterator[Sequence[int]]:
    """The lengths of what each sample has: of all samples where that costs no transform, else of the first ones."""
    if hasattr(data, "iter") and hasattr(data, "column_names"):  # of the datasets library
        columns = [name for name, value in _first(data).items() if _size(value) or name == "length"]
        if "length" in columns:
            columns = ["length"]
        if columns and not _has_transform(data):
            for batch in data.select_columns(columns).iter(1000):
                yield from zip(*(map(_length, batch[name]) for name in columns), strict=True)
            return
    count = len(data) if isinstance(data, list) else min(len(data), at_most)
    for index in range(count):
        sample = data[index]
        if not isinstance(sample, Mapping):
            return
        yield [int(sample["length"])] if "length" in sample else [_size(value) for value in sample.values()]


def _has_transform(data: Any) -> bool:
    return getattr(data, "format", {}).get("type") == "custom"


def _first(data: Any) -> Mapping[str, Any]:
    sample = data[0]
    return sample if isinstance(sample, Mapping) else {}


def _length(value: Any) -> int:
    return value if isinstance(value, int) else _size(value)


def _size(value: Any) -> int:
    """The length of a text, a list or a tensor: of what is padded with others; 0 for anything else."""
    if isinstance(value, Tensor) or hasattr(value, "shape"):
        return int(value.shape[0]) if len(value.shape) == 1 else 0
    return len(value) if isinstance(value, (str, list, tuple)) else 0


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
