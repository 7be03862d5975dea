"""The measures of a task on data that was never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trady.training.batch import batch_errors, forward, readable, split_batch
from trady.training.data.loaders import Batches
from trady.training.objective import Evaluated, Objective, joined
from trady.training.precision import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    accelerator: Accelerator,
    precision: str,
    parts: Callable[[Any], Iterable[tuple[Any, torch.Tensor, float]]] = lambda batch: [(*split_batch(batch), 1.0)],
    between: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Return what is measured, and the mean loss, with the model in eval mode.

    Args:
        model: The model.
        batches: Batches of (inputs, labels).
        objective: The loss, and what is measured.
        accelerator: Where it runs.
        precision: ``no`` or ``bf16``.
        parts: Cuts a batch into inputs, labels and share of the samples of each forward pass.
        between: Called after each batch.
    """
    was_training = model.training
    model.eval()
    total, values_of_all = 0.0, []
    try:
        for batch in readable(batches):
            values, losses = [], []
            for inputs, labels, _ in parts(batch):
                with batch_errors(inputs, labels), autocast(accelerator.device, precision):
                    output = forward(model, inputs)
                    value = objective.loss(output, labels)
                    values.append(objective.values(output, labels))
                losses.append(value.float().expand(len(labels)))
                del output
            gathered = accelerator.gather_for_metrics((joined(values), joined(losses)))
            values_of_all.append(gathered[0].cpu())
            total += float(gathered[1].sum())
            between()
    finally:
        model.train(was_training)
    everything = joined(values_of_all)
    accuracy, measures = objective.measure(everything)
    return Evaluated(accuracy, total / len(everything), measures)
