"""Filling a budget with channels, in a given order.

The rule shared by every policy that draws (TraDy, arXiv 2510.19675: channels
"until B_mem is full"): go through the channels in order and take each one that still fits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from trady.channels.selection import Selection
from trady.channels.table import Layer
from trady.errors import PolicyError
from trady.policies.base import Draw
from trady.policies.evidence import Values

Integers = npt.NDArray[np.int64]

_LARGEST = 2**63 - 1


def fill(layers: Integers, costs: Integers, capacity: int | None) -> npt.NDArray[np.bool_]:
    """Take, in order, every channel that still fits.

    The result never costs more than ``capacity``, and no channel is left out that would still
    fit. Each round takes the longest run of channels that fits and drops all channels costlier
    than what remains, so there are at most as many rounds as distinct costs (in practice a few).

    Args:
        layers: Layer index of each channel, in draw order, ``[n]``.
        costs: What one channel of each layer takes, ``[layers]``, not negative.
        capacity: How much may be taken, in the unit of ``costs``; ``None`` takes everything.

    Returns:
        Whether each channel is taken, in draw order, ``[n]``.

    Raises:
        PolicyError: When a cost is negative.
    """
    if costs.size and costs.min() < 0:
        raise PolicyError(f"a channel costs {costs.min()}; costs are not negative")
    taken = np.full(layers.shape, capacity is None)
    if capacity is not None:
        for positions in _rounds(costs[layers], min(capacity, _LARGEST)):
            taken[positions] = True
    return taken


def _rounds(cost: Integers, capacity: int) -> Iterator[Integers]:
    """Positions taken in each round; ``cost`` is that of each channel in draw order."""
    positions = np.arange(cost.size)
    while True:
        fits = cost <= capacity
        positions, cost = positions[fits], cost[fits]
        if not positions.size:
            return
        # Longer runs could overflow the cumulated cost; the remainder waits for the next round.
        run = cost[: _LARGEST // max(int(cost.max()), 1)]
        cumulated = np.cumsum(run)
        count = int(np.searchsorted(cumulated, capacity, side="right"))
        yield positions[:count]
        capacity -= int(cumulated[count - 1])
        positions, cost = positions[count:], cost[count:]


def layers_in_order(draw: Draw, names: Collection[str]) -> tuple[Layer, ...]:
    """The named layers in order of execution, whatever the order of ``names``.

    Raises:
        PolicyError: When the table lacks one of them.
    """
    wanted = set(names)
    unknown = wanted.difference(draw.table.names)
    if unknown:
        raise PolicyError(f"the pool names layers that the model lacks: {', '.join(sorted(unknown))}")
    return tuple(layer for layer in draw.table if layer.name in wanted)


def fill_selection(draw: Draw, layers: Sequence[Layer], order: Integers) -> Selection:
    """Fill the draw's capacity with channels in the given order.

    Args:
        draw: Gives the capacity and what a channel of each layer takes of it.
        layers: Where channels may be taken.
        order: Distinct positions in the channels of ``layers`` laid end to end, first choice
            first: position 0 is channel 0 of the first layer.

    Raises:
        PolicyError: When the draw has no cost for one of the layers.
    """
    unpriced = [layer.name for layer in layers if layer.name not in draw.costs]
    if unpriced:
        raise PolicyError(f"the draw gives no cost for {', '.join(unpriced)}")
    channels = np.array([layer.channels for layer in layers], dtype=np.int64)
    ends = np.cumsum(channels)
    layer_of = np.repeat(np.arange(len(layers)), channels)
    # A cost that int64 cannot hold fits in no budget either.
    costs = np.array([min(draw.costs[layer.name], _LARGEST) for layer in layers], dtype=np.int64)
    selected = np.zeros(layer_of.size, dtype=np.bool_)
    selected[order[fill(layer_of[order], costs, draw.capacity)]] = True
    return Selection(
        {
            layer.name: np.flatnonzero(selected[end - layer.channels : end])
            for layer, end in zip(layers, ends.tolist(), strict=True)
        }
    )


def fill_by_score(draw: Draw, layers: Sequence[Layer], scores: Values) -> Selection:
    """Fill the draw's capacity with the channels of the highest scores.

    Args:
        draw: Gives the capacity and the costs.
        layers: Where channels may be taken.
        scores: One score a channel of each of these layers. Equal scores keep the order of execution.

    Raises:
        PolicyError: A layer has no scores, or not one for each channel.
    """
    for layer in layers:
        if layer.name not in scores or scores[layer.name].shape != (layer.channels,):
            raise PolicyError(f"layer {layer.name!r} has {layer.channels} channels, and not one score for each")
    flat = np.concatenate([scores[layer.name] for layer in layers]) if layers else np.empty(0)
    return fill_selection(draw, layers, np.argsort(-flat, kind="stable").astype(np.int64, copy=False))
