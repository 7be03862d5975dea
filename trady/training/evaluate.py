"""Accuracy and loss on data that was never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trady.training.batch import Loss, batch_errors, forward, logits, readable, split_batch
from trady.training.data.loaders import Batches
from trady.training.precision import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    accelerator: Accelerator,
    precision: str,
    parts: Callable[[Any], Iterable[tuple[Any, torch.Tensor, float]]] = lambda batch: [(*split_batch(batch), 1.0)],
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return top-1 accuracy (0 to 1) and mean loss, with the model in eval mode.

    Args:
        model: The model.
        batches: Batches of (inputs, labels).
        loss: From (output, labels) to the mean over the samples.
        accelerator: Where it runs.
        precision: ``no`` or ``bf16``.
        parts: Cuts a batch into inputs, labels and share of the samples of each forward pass.
        between: Called after each batch.
    """
    was_training = model.training
    model.eval()
    correct = examples = 0
    total = 0.0
    try:
        for batch in readable(batches):
            hits, losses = [], []
            for inputs, labels, _ in parts(batch):
                with batch_errors(inputs, labels), autocast(accelerator.device, precision):
                    output = forward(model, inputs)
                    value = loss(output, labels)
                hits.append(logits(output).argmax(-1) == labels)
                losses.append(value.float().expand(len(labels)))
                del output
            gathered = accelerator.gather_for_metrics((_joined(hits), _joined(losses)))
            correct += int(gathered[0].sum())
            examples += len(gathered[0])
            total += float(gathered[1].sum())
            between()
    finally:
        model.train(was_training)
    return correct / examples, total / examples


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
