"""Layers of a few numbers, to be ranked."""

from __future__ import annotations

from typing import Any

from trady.channels.table import ChannelTable, Layer


def layer(
    name: str,
    channels: int = 8,
    weight: int = 3,
    activation: int = 4,
    kind: Any = "linear",
    groups: int = 1,
    tokens: int = 1,
) -> Layer:
    return Layer(
        name,
        f"{name}.weight",
        kind,
        channels,
        weight,
        activation,
        weight,
        (weight, channels),
        ((tokens, channels),),
        (),
        groups,
    )


def table_of(*layers: Any) -> ChannelTable:
    return ChannelTable(tuple(layers))


TABLE = table_of(layer("a", 3, 2, 5), layer("b", 40, 10, 6), layer("c", 12, 1, 1), layer("d", 100, 30, 20))
