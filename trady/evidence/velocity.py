"""The measure ``velocity``: how fast the output map of every output channel changes its direction from epoch to epoch.

Neurons at equilibrium (Bragagnolo, Tartaglione, Grangetto, NeurIPS 2022, arXiv 2207.09455), section 3. With
ŷ_{i,ξ} the output map of neuron i on sample ξ over its own norm, t an epoch and Ξ a few fixed samples:

    φ_i^t  = 1/|Ξ| Σ_ξ ⟨ŷ_{i,ξ}^t, ŷ_{i,ξ}^{t-1}⟩          cosine similarity to an epoch ago (distance: 1 - φ)
    Δφ_i^t = φ_i^t - φ_i^{t-1},   φ_i^0 = 1                   that of the distance, but for its sign
    v_i^t  = Δφ_i^t - μ v_i^{t-1},   v_i^0 = 0,   μ = 0.5     velocity; a neuron with |v| near 0 is at equilibrium

The map is what the layer itself computes, before normalisation and activation. Where it is a single number (a
linear layer over vectors) its cosine could only be 1 or -1, so there the samples together are the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.kinds import RecurrentCall, WeightCall
from trady.calls.mode import CallMode
from trady.calls.recognize import recognize
from trady.channels.table import ChannelTable
from trady.errors import StateError
from trady.evidence.measures import MeasureContext, Measured
from trady.interception.armed import Armed
from trady.model.batch import Batch, split
from trady.model.untouched import untouched
from trady.ops.recurrent.recurrence import states_before
from trady.policies.evidence import Evidence, Floats

KIND = "velocity"

#: μ of the formula above.
MOMENTUM = 0.5

#: Samples that are looked at. The paper finds that a single image does nearly as well as hundreds.
MOST_SAMPLES = 32

#: Name of a layer and index of its call, to what it computes: [output channels, positions].
Maps = dict[tuple[str, int], Tensor]

#: Shown one of these.
See = Callable[[tuple[str, int], Tensor], None]


class Velocity:
    """``velocity``: v of every output channel of every layer.

    The first :data:`MOST_SAMPLES` samples of the batches go through the untouched model in evaluation mode, one at
    a time, without a graph: with the weights of an epoch ago, whose maps of this one sample are kept for a moment, and
    with those of now.
    """

    needs_batches = True
    needs_snapshot = True

    def __call__(self, bench: MeasureContext) -> Measured:
        """Compare the outputs with those of an epoch ago.

        Raises:
            StateError: The samples are other ones than an epoch ago.

        """
        found = {layer.name: _Similarity(layer.outputs) for layer in bench.armed.table}
        seen, batches = hashlib.sha256(), 0
        for given, sample in islice(_samples(bench.batches, bench.armed.model), MOST_SAMPLES):
            batches = given
            for tensor in sample.tensors:
                seen.update(repr((tuple(tensor.shape), tensor.dtype)).encode() + _bytes(tensor))
            if bench.before is not None:
                with bench.earlier():
                    earlier = _maps(bench.armed, sample)
                _maps(bench.armed, sample, lambda call, now: found[call[0]].add(now, earlier[call]))  # noqa: B023
        digest = np.frombuffer(seen.digest(), dtype=np.uint8)
        if bench.before is not None and not np.array_equal(bench.before.carried[f"{KIND}/samples"], digest):
            raise StateError(_OTHER_SAMPLES)
        phi = {f"{KIND}/phi/{name}": similarity.mean() for name, similarity in found.items()}
        velocity = _velocities(bench.armed.table, bench.before, phi)
        return Measured(velocity, {**phi, f"{KIND}/samples": digest}, batches)


_OTHER_SAMPLES = (
    "the outputs are compared with those of an epoch ago, and these are other samples: pass tuner.observe the same "
    "few batches before every epoch, in the same order and without random augmentation"
)


def _samples(batches: Iterable[Any], model: torch.nn.Module) -> Iterator[tuple[int, Batch]]:
    """Every sample as a batch of one, with the number of batches so far."""
    for number, batch in enumerate(batches, start=1):
        inputs, _ = split(batch)
        for sample, _ in Batch.of(inputs, model).chunks(1):
            yield number, sample


def _velocities(table: ChannelTable, before: Evidence | None, phi: Mapping[str, Floats]) -> dict[str, Floats]:
    if before is None:
        return {layer.name: np.zeros(layer.outputs) for layer in table}
    return {
        name: phi[f"{KIND}/phi/{name}"] - before.carried[f"{KIND}/phi/{name}"] - MOMENTUM * before[KIND][name]
        for name in table.names
    }


class _Similarity:
    """Cosine similarity of each output channel's maps now and an epoch ago, sample by sample."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        self._products: list[Floats] = []
        self._single = True

    def add(self, now: Tensor, before: Tensor) -> None:
        """Take in two maps [outputs, positions]."""
        self._single &= now.shape[1] == 1
        a, b = now.double(), before.double()
        self._products.append(torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)]).cpu().numpy())

    def mean(self) -> Floats:
        """The mean over the maps; over one map of all samples where each is a single number."""
        if not self._products:
            return np.ones(self._outputs)
        product, now, before = np.stack(self._products, 1)  # each [maps, outputs]
        if self._single:
            product, now, before = (each.sum(0, keepdims=True) for each in (product, now, before))
        norms = np.sqrt(now * before)
        nothing_moved = (now == 0) & (before == 0)
        cosine = np.divide(product, norms, out=nothing_moved.astype(np.float64), where=norms > 0)
        mean: Floats = cosine.mean(0)
        return mean


def _maps(armed: Armed, sample: Batch, see: See | None = None) -> Maps:
    """Run one sample through the untouched model; return the maps of all calls, or show each and keep none."""
    watching = _Watching(armed, see)
    args, kwargs = sample.arguments
    with untouched(armed.model, sample.inputs), armed.interceptor.off(), torch.no_grad():
        armed.model.eval()
        with watching:
            armed.model(*args, **kwargs)
    return watching.found


class _Watching(CallMode):
    """Looks at what every layer computes; a later operation may overwrite it in place."""

    def __init__(self, armed: Armed, see: See | None) -> None:
        super().__init__()
        self.found: Maps = {}
        self._see = see or (lambda call, maps: self.found.update({call: maps.clone()}))
        self._names = {id(layer.weight): name for name, layer in armed.layers.items()}
        self._calls: dict[str, int] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the call, and look at its result."""
        out = func(*args, **kwargs)
        call = recognize(func, args, kwargs)
        name = self._names.get(id(call.weight)) if isinstance(call, WeightCall) else None
        if name is not None and isinstance(call, WeightCall):
            number = self._calls[name] = self._calls.get(name, -1) + 1
            spatial = 0 if call.operator.channel_dim == -1 else call.weight.dim() - 2
            seen = out
            if isinstance(call, RecurrentCall):  # its output channels are what the hidden states are multiplied to
                before = states_before(out[0].detach(), call.states[0].detach().to(out[0].dtype), call.steps)
                seen = F.linear(before, call.weight.detach().to(before.dtype))
            maps = seen.detach().movedim(-1 - spatial, 0).flatten(1) if seen.dim() > 1 else seen.detach().unsqueeze(1)
            self._see((name, number), maps)
        return out


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
