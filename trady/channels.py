"""The channel table: what updating one input channel of each layer costs.

Section 3 of the TraDy paper (arXiv 2510.19675): the unit of update is one input
channel ``c`` of a layer; it costs ``C^W_c`` weight elements and ``C^A_c`` activation
elements a sample. Every input channel of a layer costs the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import ModelError

Channels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """One weight that can be updated by input channel.

    Attributes:
        name: Path of the module that owns the weight, as in ``named_modules()``; of a module with several
            such weights, the full name of the weight.
        parameter: Full name of the weight, as in ``named_parameters()``.
        kind: ``linear``, ``addmm`` (weight stored input-major), ``conv1d``, ``conv2d`` or ``conv3d``.
        channels: Number of input channels.
        weight_elements: C^W, weight elements of one input channel.
        activation_elements: C^A, activation elements of one input channel, one sample,
            summed over the calls of the layer.
        flops: Weight-gradient multiply-adds of one input channel, one sample, summed over calls.
        weight_shape: Shape of the weight.
        input_shapes: Shape of the input of each call, before padding that the module does itself.
        output_shapes: Shape of the output of each call.
        groups: Groups of the convolution; 1 for linear layers.
    """

    name: str
    parameter: str
    kind: str
    channels: int
    weight_elements: int
    activation_elements: int
    flops: int
    weight_shape: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    groups: int = 1

    @property
    def elements(self) -> int:
        """C^W + C^A: what one channel takes of B_mem, in elements for one sample."""
        return self.weight_elements + self.activation_elements


@dataclass(frozen=True)
class FrozenLayer:
    """A weight that stays as it is (or, in the head, always trains), and why."""

    name: str
    parameter: str
    reason: str


@dataclass(frozen=True)
class ChannelTable:
    """Every layer of a model that can be updated by input channel, in order of execution.

    Attributes:
        layers: The updatable layers.
        frozen: Weights outside the table, each with its reason.
        batch: Samples in the example the costs were taken from.
        element_bytes: Bytes of one saved activation element (4 for float32).
        weight_element_bytes: Bytes of one weight element.
        parameters: Number of weight and bias elements of the whole model.
    """

    layers: tuple[Layer, ...]
    frozen: tuple[FrozenLayer, ...] = ()
    batch: int = 1
    element_bytes: int = 4
    weight_element_bytes: int = 4
    parameters: int = 0

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        """The layers under their names."""
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> Layer:
        try:
            return self.by_name[name]
        except KeyError:
            raise ModelError(f"no updatable layer {name!r}; there are {', '.join(self.by_name)}") from None

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the updatable layers, in order of execution."""
        return tuple(layer.name for layer in self.layers)

    @property
    def channel_count(self) -> int:
        """Input channels of all layers together."""
        return sum(layer.channels for layer in self.layers)

    def saved_bytes(self, selection: Selection) -> int:
        """Bytes of the activations a selection saves, for the whole batch of the example."""
        return sum(
            len(channels) * self[name].activation_elements * self.batch * self.element_bytes
            for name, channels in selection.items()
        )

    def elements(self, selection: Selection) -> int:
        """What a selection takes of B_mem: sum of C^W + C^A, elements for one sample."""
        return sum(len(channels) * self[name].elements for name, channels in selection.items())


@dataclass(frozen=True)
class Selection(Mapping[str, Channels]):
    """The input channels that train now: layer name to sorted channel indices.

    Layers without a selected channel are absent. Two selections are equal when they hold
    the same channels; ``digest`` names a selection in logs.
    """

    channels: Mapping[str, Channels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clean = {
            name: np.unique(_channel_indices(name, indices))
            for name, indices in sorted(self.channels.items())
            if len(indices)
        }
        for indices in clean.values():
            indices.setflags(write=False)
        object.__setattr__(self, "channels", clean)

    def __getitem__(self, name: str) -> Channels:
        return self.channels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def count(self) -> int:
        """Number of selected channels."""
        return sum(len(indices) for indices in self.channels.values())

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that depend on nothing but the selected channels."""
        digest = hashlib.sha256()
        for name, indices in self.channels.items():
            digest.update(name.encode() + b"\0" + indices.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for checkpoints."""
        return {name: indices.tolist() for name, indices in self.channels.items()}


def _channel_indices(name: str, indices: Any) -> Channels:
    given = np.asarray(indices)
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise ModelError(
            f"channels of {name!r} must be a list of channel numbers, not {given.ndim}-dimensional {given.dtype}; "
            "np.flatnonzero turns a mask into numbers"
        )
    return given.astype(np.int64)
