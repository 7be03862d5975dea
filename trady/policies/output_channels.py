"""Filling a budget with output channels: the first one of a layer pays for the layer's full input.

An output channel reads every input channel of its layer, so its weight gradient needs the full input of the layer,
which then serves all further output channels. In a grouped convolution the unit is a group, all of whose output
channels train together: it needs its own input channels and nothing else (:func:`trady.by_output`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from trady.channels.selection import Selection
from trady.channels.table import Layer, by_output
from trady.policies.base import Draw
from trady.policies.fill import Integers

_LARGEST = 2**63 - 1


def unit_count(layer: Layer) -> int:
    """Number of units of a layer that train together: output channels, or groups."""
    return layer.outputs if layer.groups == 1 else layer.groups


def unit_weights(layer: Layer) -> int:
    """Weight elements of one unit."""
    return layer.channels * layer.weight_elements // unit_count(layer)


def by_unit(layer: Layer, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean over the output channels of each unit; ``values``: one an output channel."""
    means: npt.NDArray[np.float64] = values.reshape(unit_count(layer), -1).mean(1)
    return means


def unit_selection(draw: Draw, layers: Sequence[Layer], units: Sequence[Integers]) -> Selection:
    """The selection of some units of each layer."""
    a_unit = [layer.outputs // unit_count(layer) for layer in layers]
    return by_output(draw.table, {v.name: u * n for v, u, n in zip(layers, units, a_unit, strict=True)})


def costs(draw: Draw, layer: Layer) -> tuple[int, int]:
    """What a layer's first unit takes beside its weights, and what each unit takes, in the unit of the capacity."""
    if layer.groups > 1:
        return 0, layer.channels // layer.groups * draw.costs[layer.name]
    unit = layer.channels * layer.weight_elements // layer.outputs * draw.weight_price
    return draw.cost(layer.name, layer.channels, 1) - unit, unit


def one_of_each(draw: Draw) -> Iterator[Selection]:
    """One unit of each layer by itself, with the layer's input: the smallest possible update is among them."""
    for layer in draw.table:
        yield unit_selection(draw, [layer], [np.zeros(1, dtype=np.int64)])


def fill_output_channels(draw: Draw, layers: Sequence[Layer], order: Integers) -> Selection:
    """Take, in order, every unit that still fits.

    The result never costs more than the draw's capacity, and no unit is left out that would still fit.

    Args:
        draw: Gives the capacity and the costs.
        layers: Where units may be taken.
        order: Distinct positions in the units of ``layers`` laid end to end, first choice first.

    """
    counts = np.array([unit_count(layer) for layer in layers], dtype=np.int64)
    layer_of = np.repeat(np.arange(len(layers)), counts)
    taken = np.zeros(layer_of.size, dtype=np.bool_)
    if draw.capacity is None:
        taken[order] = True
    else:
        priced = [[min(cost, _LARGEST // 4) for cost in costs(draw, layer)] for layer in layers]
        opening, price = np.array(priced, dtype=np.int64).reshape(-1, 2).T
        for positions in _rounds(layer_of[order], opening, price, min(draw.capacity, _LARGEST // 4)):
            taken[order[positions]] = True
    ends = np.cumsum(counts)
    units = [np.flatnonzero(taken[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    return unit_selection(draw, layers, units)


def _rounds(layer_of: Integers, opening: Integers, price: Integers, capacity: int) -> Iterator[Integers]:
    """Positions taken in each round, by position in the order.

    Each round takes the longest run that fits, then drops all layers of which nothing fits any more. All units of
    a layer cost the same, so there are at most as many rounds as layers.
    """
    positions = np.arange(layer_of.size)
    opening = opening.copy()
    while True:
        fits = (opening + price <= capacity)[layer_of]
        positions, layer_of = positions[fits], layer_of[fits]
        if not positions.size:
            return
        cost = price[layer_of]
        run = cost[: _LARGEST // 4 // max(int(cost.max()), 1)].copy()
        first = np.unique(layer_of[: run.size], return_index=True)
        run[first[1]] += opening[first[0]]
        # Nothing after the first sum above the capacity is taken, so larger sums may wrap around.
        cumulated = np.cumsum(run)
        beyond = np.flatnonzero((cumulated > capacity) | (cumulated < 0))
        count = int(beyond[0]) if beyond.size else run.size
        yield positions[:count]
        capacity -= int(cumulated[count - 1])
        opening[np.unique(layer_of[:count])] = 0
        positions, layer_of = positions[count:], layer_of[count:]
