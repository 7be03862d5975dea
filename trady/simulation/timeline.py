"""How high a training step climbs with any selection, told from one step that was measured.

The step is cut where a layer has run forward and where its weight gradient exists. What a selected
channel adds is known between those cuts: its activations from one to the other, its compact gradient
from then on, its compact weight and its optimizer state always. So one measured step with a single
channel a layer gives the peak of every other selection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable, Layer
from trady.ops.layout import CHUNK_BYTES
from trady.simulation.optimizer_memory import Form, OptimizerMemory

#: The number of a channel; grouped layers keep its group and place too (trady.ops.selected).
_NUMBER_BYTES = 8

#: The norm of a channel's gradient, which a ranking learns from.
NORM_BYTES = 4

#: Forms that a weight gradient takes while it is computed.
_FORMS = 3

#: Norms and factors of clipping (:mod:`trady.optim.clipping`): of a channel, and of a tensor.
_CLIPPING_CHANNEL_BYTES, _CLIPPING_TENSOR_BYTES = 20, 16

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """The highest live bytes up to a cut: the end of ``layer``'s ``phase`` (or of the step).

    ``phase`` is ``forward``, ``recompute`` (the layer ran forward again, on a part of the batch), ``gradient`` (the
    gradient of one of several uses was computed), ``backward`` (that of all uses has arrived), ``end`` (of the backward
    pass) or ``step``: what is there when the optimizer steps.
    """

    phase: str
    layer: str
    peak_bytes: int


@dataclass(frozen=True)
class Timeline:
    """One measured step with one channel in each layer.

    Attributes:
        intervals: The cuts in the order they happened.
        table: Costs of the channels.
        head: Each of the head's parameters, whose optimizer state counts too.
        parts: What the peak is made of, named as in the ledger; empty where it was not asked for.
        frees_gradients: Whether a compact gradient is used up when it arrives, not at the end of the step.
        accumulates: Whether the gradients of earlier passes are there all along.
        beside: Steps under other conditions; the peak of a selection is the highest of all.
    """

    intervals: tuple[Interval, ...]
    table: ChannelTable
    head: tuple[Form, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    frees_gradients: bool = False
    accumulates: bool = False
    beside: tuple[Timeline, ...] = ()

    def predicted_peak(
        self,
        selection: Selection,
        optimizer: OptimizerMemory | None = None,
        *,
        copies: int = 0,
        float_bytes: int = 0,
        norms: bool = False,
    ) -> int:
        """Bound the peak of a step with ``selection``, in bytes, weights included.

        Args:
            selection: Channels that train.
            optimizer: What the optimizer takes; plain SGD takes nothing.
            copies: Copies of all that trains that are kept beside the optimizer's.
            float_bytes: What the float channels of quantised layers take beside their weights.
            norms: Whether the norms of the channels' gradients are kept until the step.

        """
        if self.beside:
            asked = partial(_peak, selection, optimizer, copies, float_bytes, norms)
            return max(asked(timeline) for timeline in (replace(self, beside=()), *self.beside))
        optimizer, accumulates = optimizer or OptimizerMemory(), self.accumulates
        layers, weight_bytes = self.table.layers, self.table.weight_element_bytes
        counts = _integers(len(selection.channels.get(layer.name, ())) for layer in layers)
        chosen = [selection.output_count(layer.name) for layer in layers]
        of_one = _integers(layer.weight_elements * weight_bytes for layer in layers)
        compact = _integers(
            layer.share(whole, outputs)
            for layer, whole, outputs in zip(layers, (of_one * counts).tolist(), chosen, strict=True)
        )
        channels, weights = np.maximum(counts - 1, 0), np.maximum(compact - of_one, 0)
        numbers = int(_integers(1 if layer.groups == 1 else 5 for layer in layers) @ channels) + sum(
            filter(None, chosen)
        )
        copy = int(compact.sum()) + sum(form.whole for form in self.head)
        forms = [*self.head, *compact_forms(self.table, selection)]
        kept = float_bytes + _NUMBER_BYTES * numbers + int(weights.sum()) + (copies + accumulates) * copy
        kept += optimizer.kept_bytes(forms)
        kept += norms * NORM_BYTES * int(counts.sum())
        tensors = int((counts > 0).sum()) + len(self.head)
        if optimizer.copies:  # steps are counted for every tensor
            kept += _NUMBER_BYTES * tensors
        base, maps, gradients, working = self._matrices()
        narrowed = _integers(
            _narrowed_bytes(layer, self.table, outputs or 0) + _products_bytes(layer, self.table, form)
            for layer, outputs, form in zip(layers, chosen, compact.tolist(), strict=True)
        )
        live = base + maps @ channels + gradients @ weights + working @ narrowed
        stepped = self.head if self.frees_gradients else forms
        units = max((*counts.tolist(), *filter(None, chosen)), default=0)
        clipping = _CLIPPING_CHANNEL_BYTES * units + _CLIPPING_TENSOR_BYTES * tensors
        # The float channels of a layer are copied when they become more.
        in_floats = (layer.channels * self.table.float_channel_bytes(layer.name) for layer in layers)
        grown = min(float_bytes, max(in_floats, default=0))
        # By then the gradients of all parts are one.
        moment = max(optimizer.most_moment_bytes(stepped), clipping, grown) - accumulates * copy
        live[[i for i, interval in enumerate(self.intervals) if interval.phase == "step"]] += moment
        return int(live.max(initial=0)) + kept

    @property
    def least_bytes(self) -> int:
        """The peak with one channel a layer."""
        own = max((interval.peak_bytes for interval in self.intervals), default=0)
        return max(own, *(timeline.least_bytes for timeline in self.beside)) if self.beside else own

    def _matrices(self) -> tuple[Integers, Integers, Integers, Integers]:
        """Base bytes of every interval, and what is added to it.

        By a channel of each layer, by a byte of its compact parameter, and how often by what its gradient takes
        for a moment.
        """
        position = {layer.name: i for i, layer in enumerate(self.table)}
        base = _integers(interval.peak_bytes for interval in self.intervals)
        maps, gradients, working = (np.zeros((len(base), len(position)), dtype=np.int64) for _ in range(3))
        places: dict[tuple[str, str], list[int]] = {}
        for place, interval in enumerate(self.intervals):
            places.setdefault((interval.phase, interval.layer), []).append(place)
        for name, i in position.items():
            layer = self.table[name]
            saved = layer.activation_elements * self.table.batch * self.table.element_bytes
            forward, backward, again = (places.get((phase, name), []) for phase in ("forward", "backward", "recompute"))
            if not forward:
                continue
            # Recomputed, a channel is alive for one part of the batch at a time, and so is its gradient.
            first = again[0] if again else forward[0]
            last = backward[-1] if backward else places["end", ""][-1]
            maps[first : last + 1, i] += -(-saved // len(again)) if again else saved
            partial_gradients = places.get(("gradient", name), [])
            for b in range(first, last + 1) if again else sorted({*partial_gradients, *backward}):
                maps[b, i] += _gathered_bytes(layer, self.table)
                gradients[b, i] += _FORMS
                working[b, i] = 1
            if len(forward) > 1 and backward:  # some uses' gradients wait for those of the others
                waits = first if again else partial_gradients[0] + 1 if partial_gradients else len(base)
                gradients[waits : backward[-1] + 1, i] += 1
            if backward:
                gone = backward[-1] + 1 if self.frees_gradients else len(base)
                gradients[backward[0] + 1 : gone, i] += 1
        return base, maps, gradients, working


def _peak(
    selection: Selection,
    optimizer: OptimizerMemory | None,
    copies: int,
    float_bytes: int,
    norms: bool,
    timeline: Timeline,
) -> int:
    return timeline.predicted_peak(selection, optimizer, copies=copies, float_bytes=float_bytes, norms=norms)


def compact_forms(table: ChannelTable, selection: Selection) -> list[Form]:
    """The compact parameters of a selection: [channels, output channels a group, *kernel] of each layer."""
    found = []
    for name, channels in selection.items():
        layer, outputs = table[name], selection.output_count(name)
        kernel = layer.weight_shape[2:]
        share = layer.weight_elements // math.prod(kernel) if outputs is None else outputs
        found.append(Form.of((len(channels), share, *kernel), table.weight_element_bytes))
    return found


def _gathered_bytes(layer: Layer, table: ChannelTable) -> int:
    """What computing the gradient of a channel of a grouped convolution takes for a moment: gathered maps."""
    if layer.groups == 1:
        return 0
    outputs = sum(int(np.prod(shape[2:])) for shape in layer.output_shapes)
    gathered = outputs * (layer.weight_shape[0] // layer.groups) * table.batch * table.element_bytes
    return gathered + layer.activation_elements * table.batch * table.element_bytes


def _narrowed_bytes(layer: Layer, table: ChannelTable, outputs: int) -> int:
    """What the gradient of some output channels takes, which is copied out in chunks of samples."""
    elements = max((int(np.prod(shape)) // layer.outputs for shape in layer.output_shapes), default=0)
    samples = max((shape[0] for shape in layer.output_shapes), default=1)
    whole = elements * outputs * table.element_bytes
    return min(whole, max(CHUNK_BYTES, whole // max(samples, 1)))


def _products_bytes(layer: Layer, table: ChannelTable, form: int) -> int:
    """What the products of a pointwise convolution's samples take beside the first, before they are summed up.

    ``form`` are the bytes of the layer's compact parameter.
    """
    kernel = layer.weight_shape[2:]
    if not kernel or layer.groups > 1 or any(n > 1 for n in kernel):
        return 0
    return (min(table.batch, max(1, CHUNK_BYTES // max(form, 1))) - 1) * form


def _integers(values: Iterable[int]) -> Integers:
    return np.fromiter(values, dtype=np.int64)
