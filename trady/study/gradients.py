"""How a study sees the gradient of every input channel: in plain PyTorch, or in sweeps inside a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trady.channels.selection import Channels
from trady.channels.table import ChannelTable
from trady.errors import BudgetError
from trady.evidence.sweeps import See, Sweeper
from trady.ops.selected import channel_major
from trady.training.batch import Loss, forward, split_batch
from trady.training.randomness import own_randomness


class GradientSource(Protocol):
    """Shows the gradient of every channel, layer by layer, without changing the training."""

    def during(self, batch: Any, see: See) -> AbstractContextManager[None]:
        """Show the gradients of a training step on ``batch``, which runs inside the context."""

    def measure(self, batch: Any, see: See, seed: int) -> None:
        """Show the gradients of a batch at the current weights; ``seed`` is that of dropout and the like."""


class PlainGradients:
    """Gradients of a model whose weights all train: a training step computes them anyway.

    Args:
        model: The model, every weight of the table requiring a gradient.
        table: Its layers.
        loss: From (output, labels) to a scalar.
    """

    def __init__(self, model: nn.Module, table: ChannelTable, loss: Loss) -> None:
        self._model, self._loss = model, loss
        self._see: See | None = None
        for layer in table:
            everything = np.arange(layer.channels)
            weight = model.get_parameter(layer.parameter)

            def arrived(
                weight: Tensor, name: str = layer.name, channels: Channels = everything, kind: str = layer.kind,
                groups: int = layer.groups,
            ) -> None:  # fmt: skip
                if self._see is not None and weight.grad is not None:
                    rows = channel_major(weight.grad.detach(), kind, groups).flatten(0, 1).flatten(1)
                    self._see(name, channels, rows)

            weight.register_post_accumulate_grad_hook(arrived)

    @contextmanager
    def during(self, batch: Any, see: See) -> Iterator[None]:
        """Show the gradients as they arrive, before they are clipped."""
        self._see = see
        try:
            yield
        finally:
            self._see = None

    def measure(self, batch: Any, see: See, seed: int) -> None:
        """Run one forward and backward pass; the model's own gradients are restored afterwards."""
        kept = [(parameter, parameter.grad) for parameter in self._model.parameters()]
        try:
            for parameter, _ in kept:
                parameter.grad = None
            inputs, labels = split_batch(batch)
            with own_randomness(), self.during(batch, see):
                torch.manual_seed(seed)
                self._loss(forward(self._model, inputs), labels).backward()
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient


class SweptGradients:
    """Gradients of a model that trains inside a budget: all channels are seen in sweeps that each fit in it.

    Args:
        sweeper: Of the tuner that has the model.

    Raises:
        BudgetError: There is a layer of which not one channel fits.
    """

    def __init__(self, sweeper: Sweeper) -> None:
        covered = {name for selection in sweeper.selections for name in selection}
        if missing := [name for name in sweeper.armed.table.names if name not in covered]:
            raise BudgetError(
                f"a channel of {missing[0]} alone does not fit in the budget, so its gradient cannot be seen; "
                "type a larger one, or none"
            )
        self._sweeper = sweeper

    @contextmanager
    def during(self, batch: Any, see: See) -> Iterator[None]:
        """Sweep over the batch before the step trains on it."""
        self.measure(batch, see, seed=0)
        yield

    def measure(self, batch: Any, see: See, seed: int) -> None:
        """Sweep over the batch."""
        self._sweeper.visit(batch, see, seed=seed)
