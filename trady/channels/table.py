"""The channel table: what updating one input channel of each layer costs.

Section 3 of the TraDy paper (arXiv 2510.19675): the unit of update is one input
channel ``c`` of a layer; it costs ``C^W_c`` weight elements and ``C^A_c`` activation
elements a sample. Every input channel of a layer costs the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trady.channels.selection import Channels, Selection, channel_indices
from trady.errors import ModelError

#: Bytes of the index of a channel.
_INDEX_BYTES = 8

__all__ = ["ChannelTable", "Channels", "FrozenLayer", "Layer", "Selection", "by_output"]


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
        quantized: Whether the weight is stored quantised. Channels that have trained then stay beside it, in
            floating point and with all their output channels.
        standardised: Whether its filters are standardised in the forward pass (:mod:`trady.ops.standardised`).
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
    quantized: bool = False
    standardised: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as a plan has it."""
        return {name: value for name, value in asdict(self).items() if name != "standardised" or value}

    @property
    def elements(self) -> int:
        """C^W + C^A: what one channel takes of B_mem, in elements for one sample."""
        return self.weight_elements + self.activation_elements

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.weight_shape[1 if self.kind == "addmm" else 0]

    def share(self, whole: int, outputs: int | None) -> int:
        """What ``outputs`` of the output channels take, if all of them take ``whole`` (``None`` is all)."""
        return whole if outputs is None else whole * outputs // self.outputs


@dataclass(frozen=True)
class FrozenLayer:
    """A weight outside the table: it stays as it is, or always trains (in the head), and why."""

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
        parameters: Number of weight and bias elements of the model.
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

    def check_sizes(self) -> None:
        """Make sure that a table that was read can be one.

        Raises:
            ValueError: Two layers have the same name, or a size is not possible.

        """
        if len(self.by_name) < len(self.layers):
            raise ValueError("two layers have the same name")
        for layer in self.layers:
            sizes = (layer.channels, layer.groups, *layer.weight_shape, *(n for s in layer.output_shapes for n in s))
            costs = (layer.weight_elements, layer.activation_elements, layer.flops)
            if len(layer.weight_shape) < 2 or min(sizes) < 1 or min(costs) < 0 or layer.elements < 1:
                raise ValueError(f"the sizes of layer {layer.name!r} are not possible")

    def mistake(self, selection: Selection) -> str | None:
        """The first layer or channel of a selection that this model does not have; ``None`` if it has them all."""
        for name, channels in selection.items():
            layer = self.by_name.get(name)
            if layer is None:
                return f"layer {name!r}, which the model lacks"
            if (wrong := _out_of_range(channels, layer.channels)) is not None:
                return f"channel {wrong} of layer {name!r}, which has channels 0 to {layer.channels - 1}"
            outputs = selection.outputs.get(name)
            if outputs is None:
                continue
            if layer.groups > 1:
                return (
                    f"output channels of layer {name!r}, a convolution of {layer.groups} groups, each of which "
                    "trains with all its output channels: trady.by_output(table, outputs) selects those"
                )
            if (wrong := _out_of_range(outputs, layer.outputs)) is not None:
                return f"output channel {wrong} of layer {name!r}, which has output channels 0 to {layer.outputs - 1}"
        return None

    def weight_elements(self, selection: Selection) -> int:
        """Weight elements that a selection trains."""
        return sum(
            self[name].share(len(channels) * self[name].weight_elements, selection.output_count(name))
            for name, channels in selection.items()
        )

    def float_bytes(self, selection: Selection) -> int:
        """Bytes of the float channels of quantised layers, once these have trained, with their indices."""
        return sum(len(c) * self.float_channel_bytes(name) for name, c in selection.items())

    def float_channel_bytes(self, name: str) -> int:
        """Bytes of one float channel of a layer; 0 if it is not quantised."""
        layer = self[name]
        return layer.weight_elements * self.weight_element_bytes + _INDEX_BYTES if layer.quantized else 0

    def activation_elements(self, selection: Selection) -> int:
        """Activation elements that a selection keeps of one sample, whatever its output channels."""
        return sum(len(channels) * self[name].activation_elements for name, channels in selection.items())

    def flops(self, selection: Selection) -> int:
        """Weight-gradient multiply-adds of a selection for one sample."""
        return sum(
            self[name].share(len(channels) * self[name].flops, selection.output_count(name))
            for name, channels in selection.items()
        )

    @cached_property
    def all_weights(self) -> int:
        """Weight elements of all input channels of all layers."""
        return sum(layer.channels * layer.weight_elements for layer in self.layers)

    def weight_share(self, selection: Selection) -> float:
        """Share of the weight elements that a selection trains, 0 to 1; 0 where there are none."""
        return self.weight_elements(selection) / self.all_weights if self.all_weights else 0.0

    @property
    def all_elements(self) -> int:
        """What all input channels of all layers take of B_mem, elements for one sample."""
        return sum(layer.channels * layer.elements for layer in self.layers)

    def saved_bytes(self, selection: Selection) -> int:
        """Bytes of the activations that a selection keeps, for the full batch of the example."""
        return self.activation_elements(selection) * self.batch * self.element_bytes

    def elements(self, selection: Selection) -> int:
        """What a selection takes of B_mem, elements for one sample: the sum of C^W + C^A over channels.

        In a layer with chosen output channels, C^W counts these alone and C^A counts in full.
        """
        return self.weight_elements(selection) + self.activation_elements(selection)


def by_output(table: ChannelTable, outputs: Mapping[str, Any]) -> Selection:
    """Select by output channel: in each layer these output channels, and all input channels they read.

    In a grouped convolution all output channels of a group train if one of them is selected. In a depthwise
    convolution such a group is one channel, and only its own feature map is kept; of any other layer the full
    input is kept.

    Args:
        table: The layers.
        outputs: Layer name to indices of output channels.

    Raises:
        ModelError: A layer or an output channel does not exist.

    """
    channels: dict[str, Channels] = {}
    chosen: dict[str, Channels] = {}
    for name, given in outputs.items():
        layer, indices = table[name], np.unique(channel_indices(name, given))
        if not len(indices):
            continue
        if not 0 <= indices[0] <= indices[-1] < layer.outputs:
            raise ModelError(f"{name} has output channels 0 to {layer.outputs - 1}, not {indices[0]} to {indices[-1]}")
        if layer.groups > 1:
            groups = np.unique(indices // (layer.outputs // layer.groups))
            a_group = layer.channels // layer.groups
            channels[name] = (groups[:, None] * a_group + np.arange(a_group)).ravel()
        else:
            channels[name] = np.arange(layer.channels, dtype=np.int64)
            if len(indices) < layer.outputs:
                chosen[name] = indices
    return Selection(channels, chosen)


def _out_of_range(indices: Channels, count: int) -> int | None:
    """An index that is out of range, if there is one; ``indices`` are sorted."""
    return next((int(i) for i in (indices[0], indices[-1]) if not 0 <= i < count), None)
