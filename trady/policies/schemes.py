"""Schemes of sparse updates: which layers train, and which share of the input channels of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trady.channels.table import ChannelTable, Layer
from trady.errors import PolicyError
from trady.records.files import write_json
from trady.records.schema import Natural
from trady.records.versioned import Format

FORMAT = Format("trady-scheme", "scheme", PolicyError, "search one with trady search")


@dataclass(frozen=True)
class Scheme:
    """Layers and channel ratios, as MCUNetV3 publishes them (Lin et al. 2022, arXiv 2206.15472).

    Attributes:
        layers: Indices of the layers, counted from 0 at the input; the classifier is not counted.
        ratios: Share of the input channels of each that trains, 0 to 1. Where it is 0 the paper trains the bias
            alone; biases do not train here, so such a layer stays frozen.
        layer_count: Number of layers of the network; 0 is unknown. A network with another number is refused.
    """

    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    layer_count: int = 0

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.ratios):
            raise PolicyError(f"a scheme of {len(self.layers)} layers has {len(self.ratios)} ratios; give one for each")
        for place in self.layers:
            if not _is_number(place, int) or place < 0:
                raise PolicyError(f"a scheme names layer {place!r}; layers are counted from 0 at the input")
        if len(set(self.layers)) < len(self.layers):
            raise PolicyError(f"a scheme names a layer twice: {sorted(self.layers)}")
        for ratio in self.ratios:
            if not _is_number(ratio, int, float) or not 0 <= ratio <= 1:
                raise PolicyError(f"a scheme has ratio {ratio!r}; a ratio is a share of channels, 0 to 1")

    def counts(self, table: ChannelTable) -> dict[str, int]:
        """How many channels of each layer train: the ratio of its channels, rounded, and at least one.

        Raises:
            PolicyError: The network has too few layers, or another number than the scheme was made for.

        """
        layers = scheme_layers(table)
        if self.layer_count and self.layer_count != len(layers):
            raise PolicyError(
                f"the scheme is for a network of {self.layer_count} layers, this one has {len(layers)}; "
                "search one for it with trady search"
            )
        if self.layers and max(self.layers) >= len(layers):
            raise PolicyError(
                f"the scheme trains layer {max(self.layers)}, and this network has layers 0 to {len(layers) - 1}; "
                "search one for it with trady search"
            )
        return {
            layers[place].name: max(1, int(ratio * layers[place].channels + 0.5))
            for place, ratio in sorted(zip(self.layers, self.ratios, strict=True))
            if ratio > 0
        }

    def elements(self, table: ChannelTable) -> int:
        """What the scheme takes of B_mem: Σ C^W_c + C^A_c, elements for one sample."""
        return sum(count * table[name].elements for name, count in self.counts(table).items())

    def to_json(self) -> dict[str, Any]:
        """Plain values; :meth:`from_json` reads them back."""
        return {
            **FORMAT.header(),
            "layer_indices": list(self.layers),
            "channel_ratios": list(self.ratios),
            "layer_count": self.layer_count,
        }

    @classmethod
    def from_json(cls, data: object) -> Scheme:
        """Read what :meth:`to_json` wrote, or a mapping with ``layer_indices`` and ``channel_ratios``.

        Raises:
            PolicyError: It is something else, of another version, or damaged.

        """
        if not isinstance(data, Mapping) or not {"layer_indices", "channel_ratios"} <= set(data):
            raise PolicyError("this is no scheme: it lacks layer_indices and channel_ratios; trady search writes one")
        record = FORMAT.read(_Record, {**FORMAT.header(), **data})  # published schemes have no header
        return cls(record.layer_indices, record.channel_ratios, record.layer_count)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; one of that name is replaced completely or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scheme:
        """Read a file that :meth:`save` wrote.

        Raises:
            PolicyError: It cannot be read, or holds no scheme.

        """
        return FORMAT.load(path, cls.from_json)


@dataclass(frozen=True)
class _Record:
    """The entries of a scheme's file, under the names that MCUNetV3 gives them."""

    layer_indices: tuple[int, ...]
    channel_ratios: tuple[float, ...]
    layer_count: Natural = 0


def scheme_layers(table: ChannelTable) -> list[Layer]:
    """The layers that a scheme counts: the convolutions, or all layers of a network without any."""
    return [layer for layer in table if layer.kind.startswith("conv")] or list(table)


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
