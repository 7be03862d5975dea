"""A training step to be measured."""

from __future__ import annotations

from typing import Any

from torch import nn

FLOAT = 4


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10, **options),
    )


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


class Step:
    """A step of a model, with what a test may want to vary."""

    def __init__(self, model: nn.Module, batch: Any, optimizer: Any = None, loss: Any = None) -> None:
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.loss = loss or (lambda output: output.square().mean())

    def __call__(self) -> None:
        self.loss(self.model(self.batch)).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
