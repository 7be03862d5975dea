"""Layers of a few numbers, to be ranked."""

from trady.channels.table import ChannelTable, Layer


def layer(name, channels=8, weight=3, activation=4, kind="linear", groups=1, tokens=1):
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


def table_of(*layers):
    return ChannelTable(tuple(layers))


TABLE = table_of(layer("a", 3, 2, 5), layer("b", 40, 10, 6), layer("c", 12, 1, 1), layer("d", 100, 30, 20))
