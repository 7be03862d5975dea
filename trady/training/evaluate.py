"""Accuracy and loss on data that was never trained on."""

from __future__ import annotations

from collections.abc import Callable

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
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return top-1 accuracy (0 to 1) and mean loss, with the model in eval mode; call ``between`` after each batch."""
    was_training = model.training
    model.eval()
    correct = examples = 0
    total = 0.0
    try:
        for batch in readable(batches):
            inputs, labels = split_batch(batch)
            with batch_errors(inputs, labels), autocast(accelerator.device, precision):
                output = forward(model, inputs)
                value = loss(output, labels)
            hits = logits(output).argmax(-1) == labels
            gathered = accelerator.gather_for_metrics((hits, value.float().expand(len(hits))))
            correct += int(gathered[0].sum())
            examples += len(gathered[0])
            total += float(gathered[1].sum())
            between()
    finally:
        model.train(was_training)
    return correct / examples, total / examples
