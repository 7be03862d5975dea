"""How high a training step climbs with any selection, told from one step that was measured.

The step is cut where a layer has run forward and where its weight gradient exists. What a selected
channel adds is known between those cuts: its activations from one to the other, its compact gradient
from then on, its compact weight and its optimizer state always. So one measured step with a single
channel a layer gives the peak of every other selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trady.channels import ChannelTable, Layer, Selection

#: The number of a channel; grouped layers keep its group and place too (trady.ops.selected).
_NUMBER_BYTES = 8


@dataclass(frozen=True)
class Interval:
    """The highest live bytes up to a cut: the end of ``layer``'s ``phase`` (or of the step).

    ``phase`` is ``forward``, ``recompute`` (the layer ran forward anew, on a part of the batch), ``backward``
    or ``end``.
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
        head_bytes: Bytes of the head's parameters, whose optimizer state counts too.
        parts: What the peak is made of, named as in the ledger; empty where it was not asked for.
    """

    intervals: tuple[Interval, ...]
    table: ChannelTable
    head_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    def predicted_peak(self, selection: Selection, state_copies: int = 0) -> int:
        """Bound the peak of a step with ``selection``, in bytes, weights included.

        Args:
            selection: Channels that train.
            state_copies: Copies of a parameter that the optimizer keeps (0 for SGD, 2 for Adam).

        """
        names = [layer.name for layer in self.table]
        extra = np.array([max(len(selection.channels.get(name, ())) - 1, 0) for name in names], dtype=np.int64)
        base, added = self._matrix()
        always = np.array(
            [layer.weight_elements * self.table.weight_element_bytes for layer in self.table], dtype=np.int64
        )
        numbers = np.array([_NUMBER_BYTES * (1 if layer.groups == 1 else 5) for layer in self.table], dtype=np.int64)
        counts = np.array([len(selection.channels.get(name, ())) for name in names], dtype=np.int64)
        kept = int((always + numbers) @ extra) + state_copies * (int(always @ counts) + self.head_bytes)
        if state_copies:  # steps are counted for every tensor
            kept += _NUMBER_BYTES * int((counts > 0).sum() + 1)
        return int((base + added @ extra).max(initial=0)) + kept

    @property
    def least_bytes(self) -> int:
        """The peak with one channel a layer."""
        return max((interval.peak_bytes for interval in self.intervals), default=0)

    def _matrix(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Base bytes of every interval, and what one channel of each layer adds to it."""
        position = {layer.name: i for i, layer in enumerate(self.table)}
        base = np.array([interval.peak_bytes for interval in self.intervals], dtype=np.int64)
        added = np.zeros((len(base), len(position)), dtype=np.int64)
        places: dict[tuple[str, str], list[int]] = {}
        for place, interval in enumerate(self.intervals):
            places.setdefault((interval.phase, interval.layer), []).append(place)
        for name, i in position.items():
            layer = self.table[name]
            saved = layer.activation_elements * self.table.batch * self.table.element_bytes
            forward, backward, anew = (places.get((phase, name), []) for phase in ("forward", "backward", "recompute"))
            if not forward:
                continue
            # Computed anew, a channel is alive for one part of the batch at a time, and so is its gradient.
            first = anew[0] if anew else forward[0]
            last = backward[-1] if backward else len(base) - 1
            added[first : last + 1, i] += -(-saved // len(anew)) if anew else saved
            for b in range(first, last + 1) if anew else backward:
                added[b, i] += _working_bytes(layer, self.table)
            if backward:
                added[backward[0] + 1 :, i] += layer.weight_elements * self.table.weight_element_bytes
        return base, added


def _working_bytes(layer: Layer, table: ChannelTable) -> int:
    """What computing one channel's gradient takes for a moment: the gradient in three forms, gathered maps."""
    gradient = 3 * layer.weight_elements * table.weight_element_bytes
    if layer.groups == 1:
        return gradient
    outputs = sum(int(np.prod(shape[2:])) for shape in layer.output_shapes)
    gathered = outputs * (layer.weight_shape[0] // layer.groups) * table.batch * table.element_bytes
    return gradient + gathered + layer.activation_elements * table.batch * table.element_bytes
