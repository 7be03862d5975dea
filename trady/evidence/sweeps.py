"""Every channel's gradient inside a budget: the channels are cut into selections that each fit, one sweep for each.

One engine serves the layer ranking (:func:`trady.rank`) and what policies want measured
(:mod:`trady.evidence.measures`). A sweep changes no weight, no gradient, no random number and no selection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trady.channels.selection import Channels, Selection
from trady.interception.armed import Armed
from trady.model.batch import Batch, Loss, loss_of
from trady.model.parameters import own_parameters
from trady.model.python_state import seed_generators
from trady.model.untouched import untouched
from trady.policies.evidence import Floats

#: From the gradient of the selected slices ``W[:, c]`` [n, weight elements of a channel] to [n].
Reduce = Callable[[Tensor], Tensor]

#: Shown a layer's name, some of its channels ``[n]`` and their gradient ``[n, weight elements of a channel]``.
See = Callable[[str, Channels, Tensor], None]

#: Called with (passes done, passes of this batch and those before).
Progress = Callable[[int, int], None]

_ROW_BYTES = 1 << 18


@dataclass(frozen=True)
class Sweeper:
    """Runs batches through an armed model, once for each selection.

    Attributes:
        armed: The model; its selection is put aside for the time.
        head: Parameters of the head. They stay frozen while it runs.
        selections: Channels to measure at a time.
        loss: From (outputs, targets) to the mean over the samples; ``None`` takes the model's own ``output.loss``.
        micro_batch: Samples a forward and backward pass; a batch's gradient is the mean over its parts.
        seed: Of dropout and the like, the same for every selection.
        progress: Told of every pass.
    """

    armed: Armed
    head: Collection[nn.Parameter]
    selections: tuple[Selection, ...]
    loss: Loss | None = None
    micro_batch: int | None = None
    seed: int = 0
    progress: Progress | None = field(default=None, compare=False)

    def mean(self, batches: Iterable[Any], reduce: Reduce) -> Means:
        """Average ``reduce`` of every channel's gradient over the batches; what is not finite counts as 0.

        Args:
            batches: Pairs (inputs, targets), or mappings that the model computes a loss from; each is looked
                at once, and none is kept.
            reduce: What is averaged.

        """
        sums = {layer.name: np.zeros(layer.channels) for layer in self.armed.table}
        device = next(iter(self.armed.model.parameters())).device
        done = given = 0
        with set_aside(self.armed, self.head):
            for batch in batches:
                given += 1
                for selection in self.selections:
                    self.armed.select(selection)
                    self._backward(batch, self.seed + given - 1, device)
                    for name, channels in selection.items():
                        sums[name][channels] += self._reduced(name, reduce)
                    done += 1
                    if self.progress is not None:
                        self.progress(done, given)
        return Means({name: values / max(given, 1) for name, values in sums.items()}, given)

    def visit(self, batch: Any, see: See, *, seed: int) -> None:
        """Show the gradient of every channel on one batch, a few channels at a time.

        Args:
            batch: A pair (inputs, targets), or a mapping that the model computes a loss from.
            see: Called with a layer's name, some of its channels ``[n]``, and their gradient
                ``[n, weight elements of a channel]``, which is gone when it returns.
            seed: Of dropout and the like.

        """
        device = next(iter(self.armed.model.parameters())).device
        with set_aside(self.armed, self.head):
            for selection in self.selections:
                self.armed.select(selection)
                self._backward(batch, seed, device)
                for name, channels in selection.items():
                    start = 0
                    for gradient in self._rows(name):
                        see(name, channels[start : start + len(gradient)], gradient)
                        start += len(gradient)

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss, if it is a module: it may keep state, as a model does."""
        return self.loss if isinstance(self.loss, nn.Module) else None

    def _backward(self, batch: Any, seed: int, device: torch.device) -> None:
        with untouched(self.armed.model, self.loss_module, batch) as writes:
            seed_generators(seed)
            for chunk, share in Batch.of(batch).chunks(self.micro_batch):
                value = loss_of(self.armed.model, chunk.inputs, self.loss)
                with writes.paused(), torch.autocast(device.type, enabled=False):
                    (value if share == 1.0 else value * share).backward()

    def _reduced(self, name: str, reduce: Reduce) -> Floats:
        reduced = [reduce(gradient) for gradient in self._rows(name)]
        if not reduced:
            return np.zeros(len(self.armed.layers[name].compact))
        found = torch.cat(reduced)
        return torch.where(found.isfinite(), found, 0.0).cpu().numpy()

    def _rows(self, name: str) -> Iterator[Tensor]:
        """Take a layer's gradient, a few rows at a time, so that float64 copies stay small."""
        compact = self.armed.layers[name].compact
        gradient, compact.grad = compact.grad, None
        if gradient is None:
            return
        rows = max(1, _ROW_BYTES // max(gradient[0].nbytes, 1))
        for part in gradient.split(rows):
            yield part.flatten(1)


@dataclass(frozen=True)
class Means:
    """Averages over batches: one number a channel of every layer, and the number of batches."""

    values: Mapping[str, Floats]
    batches: int


def squared_norm(gradient: Tensor) -> Tensor:
    """‖∂L/∂W[:, c]‖₂² of each channel."""
    return gradient.double().square_().sum(1)


@contextmanager
def set_aside(armed: Armed, head: Collection[nn.Parameter]) -> Iterator[None]:
    """Take selection, gradients, callbacks and the head's flags away, and give them back as they were."""
    with armed.shown.off():  # gradients and flags are those of the weights themselves
        selection, callbacks = armed.selection, list(armed.on_gradient)
        compacts = [layer.compact for layer in armed.layers.values()]
        gradients = [(p, p.grad) for p in (*compacts, *own_parameters(armed.model))]
        flags = [(p, p.requires_grad) for p in (*head, *compacts)]
        try:
            armed.on_gradient.clear()
            for compact in compacts:  # a sweep over the very channels that train would add to their gradient
                compact.grad = None
                compact.requires_grad_(True)
            for parameter in head:
                parameter.requires_grad_(False)
            yield
        finally:
            for compact in compacts:
                compact.grad = None
            armed.select(selection)
            armed.on_gradient.extend(callbacks)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
