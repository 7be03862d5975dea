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
import math
from collections.abc import Iterable, Iterator, Mapping
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

#: Name of a layer and index of its call, to the first output channel, and what it and the next compute:
#: [output channels, positions].
Maps = dict[tuple[str, int], tuple[int, Tensor]]

#: Bytes of a map that are compared at a time, in float64, where a sixteenth of the map is less.
_CHUNK_BYTES = 1 << 13


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
        for number, (given, sample, waiting) in enumerate(
            islice(_samples(bench.batches, bench.armed.model), MOST_SAMPLES)
        ):
            batches = given
            for tensor in sample.tensors:
                seen.update(repr((tuple(tensor.shape), tensor.dtype)).encode() + _bytes(tensor))
            if bench.before is not None:
                _compare(bench, number, sample, waiting, found)
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


def _samples(batches: Iterable[Any], model: torch.nn.Module) -> Iterator[tuple[int, Batch, int]]:
    """Every sample as a batch of one, with the number of batches so far, and the bytes of the others of its batch."""
    for number, batch in enumerate(batches, start=1):
        inputs, _ = split(batch)
        whole = Batch.of(inputs, model)
        for sample, _ in whole.chunks(1):
            yield number, sample, whole.nbytes - sample.nbytes


def _compare(
    bench: MeasureContext, number: int, sample: Batch, waiting_bytes: int, found: Mapping[str, _Similarity]
) -> None:
    """Compare the maps of one sample, as many of them at a time as there is room for beside the rest of its batch."""
    room, done = bench.room(sample) - waiting_bytes - 4 * _CHUNK_BYTES, dict[tuple[str, int], int]()
    while True:
        with bench.earlier():
            earlier = _Keeping(bench.armed, done, room)
            _run(bench.armed, sample, earlier)
        if not earlier.found:
            return
        _run(bench.armed, sample, _Comparing(bench.armed, earlier, number, found))
        done.update(earlier.done)


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
        self._by_map: dict[tuple[int, int], Floats] = {}
        self._single = True

    def add(self, which: tuple[int, int], start: int, now: Tensor, before: Tensor) -> None:
        """Take in two maps [outputs, positions], from an output channel on.

        Args:
            which: Numbers of the sample and of the layer's call.
            start: The first of the output channels.
            now: Maps of now.
            before: Maps of an epoch ago.
        """
        self._single &= now.shape[1] == 1
        products = self._by_map.setdefault(which, np.zeros((3, self._outputs)))
        rows = max(1, max(now.nbytes // 16, _CHUNK_BYTES) // max(8 * now.shape[1], 1))
        for first, (a, b) in enumerate(zip(now.split(rows), before.split(rows), strict=True)):
            place = start + first * rows
            products[:, place : place + len(a)] = _products(a.double(), b.double())

    def mean(self) -> Floats:
        """The mean over the maps; over one map of all samples where each is a single number."""
        if not self._by_map:
            return np.ones(self._outputs)
        product, now, before = np.stack(list(self._by_map.values()), 1)  # each [maps, outputs]
        if self._single:
            product, now, before = (each.sum(0, keepdims=True) for each in (product, now, before))
        norms = np.sqrt(now * before)
        nothing_moved = (now == 0) & (before == 0)
        cosine = np.divide(product, norms, out=nothing_moved.astype(np.float64), where=norms > 0)
        mean: Floats = cosine.mean(0)
        return mean


def _products(a: Tensor, b: Tensor) -> Floats:
    products: Floats = torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)]).cpu().numpy()
    return products


def _run(armed: Armed, sample: Batch, watching: CallMode) -> None:
    """Run one sample through the untouched model."""
    args, kwargs = sample.arguments
    with untouched(armed.model, sample.inputs), armed.interceptor.off(), torch.no_grad():
        armed.model.eval()
        with watching:
            armed.model(*args, **kwargs)


class _Looking(CallMode):
    """Looks at what every layer computes; a later operation may overwrite it in place."""

    def __init__(self, armed: Armed) -> None:
        super().__init__()
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
            self.see((name, number), maps)
        return out

    def see(self, call: tuple[str, int], maps: Tensor) -> None:
        """Look at what a layer has computed, ``[output channels, positions]``."""
        raise NotImplementedError


class _Keeping(_Looking):
    """Keeps copies of maps, of as many output channels as there is room for, but of one at least.

    Args:
        armed: The armed model.
        done: Output channels of each call that were looked at before.
        room: Bytes that the copies may take.

    Attributes:
        found: The maps, and the first output channel of each.
        done: Output channels of each call that have been looked at, with those in ``found``.
    """

    def __init__(self, armed: Armed, done: Mapping[tuple[str, int], int], room: float) -> None:
        super().__init__(armed)
        self.found: Maps = {}
        self.done = dict(done)
        self._room = room

    def see(self, call: tuple[str, int], maps: Tensor) -> None:
        """Keep a copy."""
        start = self.done.get(call, 0)
        left, of_one = len(maps) - start, maps[:1].nbytes
        fits = left if self._room == math.inf else int(self._room // max(of_one, 1))
        count = min(left, max(fits, int(not self.found)))
        if count > 0:
            self.found[call] = start, maps[start : start + count].clone()
            self.done[call] = start + count
            self._room -= count * of_one


class _Comparing(_Looking):
    """Compares maps with those of an epoch ago, and lets these go."""

    def __init__(self, armed: Armed, earlier: _Keeping, number: int, found: Mapping[str, _Similarity]) -> None:
        super().__init__(armed)
        self._earlier, self._number, self._found = earlier.found, number, found

    def see(self, call: tuple[str, int], maps: Tensor) -> None:
        """Compare."""
        if call in self._earlier:
            start, before = self._earlier.pop(call)
            which = self._number, call[1]
            self._found[call[0]].add(which, start, maps[start : start + len(before)], before)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
