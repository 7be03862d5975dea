"""Weights and compact parameters kept the same, in all layers of a draw at once.

A step looks four times for writes into one of them, and nearly always finds the optimizer's alone. So what such a look
needs of a layer (its index, a view of its memory) is made once a draw, and the layers are compared and summed up
together. Where something differs, each layer decides by itself (:meth:`ArmedLayer.follow`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from trady.interception.layer import PART_BYTES, ArmedLayer, as_whole_numbers
from trady.model.untouched import unseen
from trady.ops.native import library
from trady.ops.selected import DenseWeight, channel_dim


class Writes:
    """Looks for writes into the layers whose channels train.

    Args:
        layers: The layers, for as long as these channels train.
    """

    def __init__(self, layers: Iterable[ArmedLayer] = ()) -> None:
        self.layers = [layer for layer in layers if layer.selected is not None]
        quick = {id(layer): layer for layer in self.layers if _is_quick(layer)}
        self._others = [layer for layer in self.layers if id(layer) not in quick]
        self._groups = [_Group(layers) for layers in _grouped(quick.values())]

    def write_back(self) -> None:
        """Copy the compact parameters that an optimizer has changed into the weights.

        Where it is the weight that was changed (somebody loaded a checkpoint), the compact parameter follows.
        """
        with unseen(), torch.no_grad():
            for group in self._groups:
                group.write_back()
            for layer in self._others:
                if layer.is_stale:
                    layer.copy_over()
                    layer.note()

    def follow(self) -> None:
        """Let both be the same where somebody wrote into one of them, in whatever way."""
        with unseen(), torch.no_grad():
            for group in self._groups:
                if not group.is_the_same():
                    for layer in group.layers:
                        layer.follow()
            for layer in self._others:
                layer.follow()

    def note(self, written: Iterable[ArmedLayer]) -> None:
        """Remember the bits of the compact parameters of some layers: they are those of the weights."""
        some = set(map(id, written))
        with unseen(), torch.no_grad():
            for group in self._groups:
                group.note(some)
            for layer in self._others:
                if id(layer) in some:
                    layer.note()

    def hear_last(self) -> None:
        """Be told of gradients after everybody else: an optimizer may use them up then."""
        for layer in self.layers:
            layer.hear_last()


def _is_quick(layer: ArmedLayer) -> bool:
    """Whether a layer is compared with others: on the CPU, where a copy of its channels is memory of no account."""
    compact, truth = layer.compact, layer.truth
    return (
        compact.device.type == "cpu"
        and isinstance(truth, DenseWeight)
        and truth.weight.device.type == "cpu"
        and compact.nbytes <= PART_BYTES
        and compact.is_contiguous()
        and layer.selected is not None
        and channel_dim(truth.weight, truth.kind, truth.groups, layer.selected) is not None
    )


def _grouped(layers: Iterable[ArmedLayer]) -> Iterator[list[ArmedLayer]]:
    """Layers of one type, as many as can be copied one behind the other."""
    by_type: dict[torch.dtype, tuple[list[ArmedLayer], int]] = {}
    for layer in layers:
        dtype, nbytes = layer.compact.dtype, layer.compact.nbytes
        group, room = by_type.get(dtype, ([], PART_BYTES))
        if group and nbytes > room:
            yield group
            group, room = [], PART_BYTES
        by_type[dtype] = [*group, layer], room - nbytes
    for group, _ in by_type.values():
        yield group


class _Group:
    """Layers that are looked at together."""

    def __init__(self, layers: list[ArmedLayer]) -> None:
        self.layers = layers
        self._places = list(map(_Place, layers))
        #: What the C kernel reads, a line a layer, with its address, and the pointers that it is of.
        self._slices, self._address = np.empty((0, 7), dtype=np.int64), 0
        self._pointers: list[tuple[int, int]] = []
        self._starts = np.cumsum([0, *(place.bits.numel() for place in self._places)])[:-1]

    def _look(self) -> list[_Place]:
        """The places, those made again whose parameter was given other memory (``.data``)."""
        places = self._places
        for index, place in enumerate(places):
            if not place.holds:
                places[index] = _Place(place.layer)
        return places

    def is_the_same(self) -> bool:
        """Whether each compact parameter holds the channels of its weight."""
        places, kernels = self._look(), library()
        if kernels is None:
            return all([place.is_the_same() for place in places])  # noqa: C419 - faster
        pointers = [place.pointers for place in places]
        if pointers != self._pointers:
            self._slices = np.array([(*place.pointers, *place.geometry) for place in places], dtype=np.int64)
            self._pointers, self._address = pointers, self._slices.ctypes.data
        return bool(kernels.trady_same_slices(self._address, len(places)))

    def write_back(self) -> None:
        """Copy what is in one of the two alone to the other."""
        stale = [index for index, layer in enumerate(self.layers) if layer.is_stale]
        if not stale:
            return
        places = self._look()
        for index in stale:
            self.layers[index].copy_over(places[index].write)
        self.note({id(self.layers[index]) for index in stale})

    def note(self, some: set[int]) -> None:
        """Remember the bits of the compact parameters of some of the layers."""
        bits = torch.cat([place.bits for place in self._look()]).numpy()
        sums = np.add.reduceat(bits, self._starts, dtype=np.int64).tolist()
        for layer, total in zip(self.layers, sums, strict=True):
            if id(layer) in some:
                layer.note(total)


class _Place:
    """Where the channels of a layer are, in its weight and in its compact parameter."""

    __slots__ = ("_dim", "_index", "_mine", "_pointer", "_weight", "bits", "layer")

    def __init__(self, layer: ArmedLayer) -> None:
        truth, selected, compact = layer.truth, layer.selected, layer.compact.detach()
        assert isinstance(truth, DenseWeight)
        assert selected is not None
        self.layer, self._weight, self._index = layer, layer.weight, selected.index
        dim = channel_dim(truth.weight, truth.kind, truth.groups, selected)
        assert dim is not None
        self._dim, self._mine = dim, compact.transpose(0, 1) if dim else compact
        self.bits = as_whole_numbers(compact).view(-1)
        self._pointer = compact.data_ptr()

    @property
    def geometry(self) -> tuple[int, int, int, int, int]:
        """Address of the indices, then of the weight [outer, channels, inner] its sizes, inner in bytes, and theirs."""
        weight, dim = self._weight, self._dim
        outer = weight.shape[0] if dim else 1
        inner = weight.nbytes // max(1, outer * weight.shape[dim])
        return self._index.data_ptr(), outer, weight.shape[dim], inner, len(self._index)

    @property
    def pointers(self) -> tuple[int, int]:
        """Where weight and compact parameter are."""
        return self._weight.data_ptr(), self._pointer

    @property
    def holds(self) -> bool:
        return self._pointer == self.layer.compact.data_ptr()

    def is_the_same(self) -> bool:
        return torch.equal(self._mine, self._weight.index_select(self._dim, self._index))

    def write(self) -> None:
        self._weight.index_copy_(self._dim, self._index, self._mine.to(self._weight.dtype))
