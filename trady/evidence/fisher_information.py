"""Fisher information of activations, of whole batches at once.

TinyTrain (Kwon et al. 2024, arXiv 2307.09988): with a_nc the activations of channel c of sample n and L_n its loss,

    Δ_c = 1/(2N) Σ_n (Σ_positions a_nc · ∂L_n/∂a_nc)²

The inner sum is the gradient of a factor of 1 on a_nc (:mod:`trady.ops.gates`). Where samples do not meet in the
model (frozen normalisation), the gradient of Σ_n L_n by the factors of sample n is that of L_n alone, so one pass
of a batch gives what a pass of each sample would. Whether they meet is found out, not assumed: the loss of the
first of two samples must reach nothing that is taken for the second one's. Where it does, where two samples do not
tell, or where the model computes its own loss, every sample is a batch of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trady.channels.selection import Selection
from trady.evidence.sweeps import Means, Sweeper, set_aside
from trady.model.batch import Batch, loss_of, split
from trady.model.python_state import seed_generators
from trady.model.untouched import untouched
from trady.ops.gates import NotBySampleError
from trady.policies.evidence import Floats

#: Layer name to the gradient of its gates, [channels, samples]; without layers that no gradient reaches.
Found = Mapping[str, Tensor]


def fisher_information(sweeper: Sweeper, batches: Iterable[Any]) -> Means:
    """Measure Δ_c of the input of every layer, averaged over all samples of the batches.

    What is not finite counts as 0, and what :func:`trady.evidence.sweeps.set_aside` names is left as it was.

    Args:
        sweeper: The model, its loss, and what to measure at a time; its progress is told of every pass.
        batches: Pairs (inputs, targets), or mappings that the model computes a loss from; each is looked at
            once, and none is kept.

    """
    return _Measurement(sweeper).of(batches)


class _Measurement:
    """What is known so far."""

    def __init__(self, sweeper: Sweeper) -> None:
        self._sweeper, self._armed = sweeper, sweeper.armed
        self._apart: dict[int, bool] = {}
        self._sums = {layer.name: np.zeros(layer.channels) for layer in self._armed.table}
        self._device = next(iter(self._armed.model.parameters())).device
        self._samples = self._done = self._batches = 0

    def of(self, batches: Iterable[Any]) -> Means:
        with set_aside(self._armed, self._sweeper.head):
            for batch in batches:
                self._batches += 1
                for chunk, _ in Batch.of(batch).chunks(self._sweeper.micro_batch):
                    for place, selection in enumerate(self._sweeper.selections):
                        self._armed.select(selection)
                        self._add(place, selection, chunk)
                    self._samples += _count(chunk)
        return Means({name: sums / max(self._samples, 1) for name, sums in self._sums.items()}, self._batches)

    def _add(self, place: int, selection: Selection, chunk: Batch) -> None:
        count = _count(chunk)
        if count > 1 and place not in self._apart:
            self._apart[place] = self._are_apart(selection, chunk.chunk(0, 2).inputs)
        if count > 1 and self._apart[place]:
            try:
                self._take(selection, self._pass(chunk.inputs, count, count, self._samples))
                return
            except NotBySampleError:  # another shape than that of the first batch
                self._apart[place] = False
        for number, (sample, _) in enumerate(chunk.chunks(1)):
            self._take(selection, self._pass(sample.inputs, 1, 1, self._samples + number))

    def _take(self, selection: Selection, found: Found) -> None:
        for name, gradient in found.items():
            self._sums[name][selection[name]] += _half_squares(gradient)
        self._done += 1
        if self._sweeper.progress is not None:
            self._sweeper.progress(self._done, self._batches)

    def _are_apart(self, selection: Selection, pair: Any) -> bool:
        """Whether the first sample's loss reaches each layer, and there nothing but the first sample."""
        try:
            found = self._pass(pair, 2, 1, self._samples)
        except NotBySampleError:
            return False
        return all(
            name in found and bool(found[name][:, 0].any()) and not bool(found[name][:, 1].any()) for name in selection
        )

    def _pass(self, part: Any, samples: int, losses: int, number: int) -> Found:
        """Run some samples forward, and the losses of the first few of them backward."""
        with (
            self._armed.gated(samples) as gates,
            untouched(self._armed.model, self._sweeper.loss_module, part) as writes,
        ):
            seed_generators(self._sweeper.seed + number)
            value = self._loss(part, samples, losses)
            with writes.paused(), torch.autocast(self._device.type, enabled=False):
                value.backward()
            return {name: gate.grad for name, gate in gates.items() if gate.grad is not None}

    def _loss(self, part: Any, samples: int, losses: int) -> Tensor:
        """Sum the losses of the first samples, each as if it were a batch."""
        loss, (inputs, targets) = self._sweeper.loss, split(part)
        if samples == 1:
            return loss_of(self._armed.model, part, loss)
        if loss is None:
            raise NotBySampleError("the model computes its loss of the whole batch")
        args, kwargs = Batch.of(inputs, self._armed.model).arguments
        by_sample = zip(_cut(self._armed.model(*args, **kwargs), samples), _cut(targets, samples), strict=True)
        return torch.stack([loss(output, target) for output, target in list(by_sample)[:losses]]).sum()


def _count(chunk: Batch) -> int:
    """The number of samples among the inputs of a pair, or of a mapping."""
    return Batch.of(split(chunk.inputs)[0]).samples


def _cut(tree: Any, samples: int) -> list[Any]:
    """Every sample of outputs or targets as a batch of its own."""
    leaves, form = tree_flatten(tree)
    if not all(isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == samples for leaf in leaves):
        raise NotBySampleError("outputs or targets are no tensors of one row a sample")
    return [tree_unflatten(list(rows), form) for rows in zip(*(leaf.split(1) for leaf in leaves), strict=True)]


def _half_squares(gradient: Tensor) -> Floats:
    """½ Σ_n g[c, n]², [channels]."""
    squares = gradient.double().square_()
    return torch.where(squares.isfinite(), squares, 0.0).sum(1).div_(2).cpu().numpy()
