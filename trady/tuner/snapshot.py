"""The weights as they were when a policy last measured: a copy of what trains, and a way back to it.

Whoever compares a model with itself an epoch ago needs no more than this: all other weights are as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from trady.channels.selection import Channels, Selection
from trady.errors import CheckpointError
from trady.interception.armed import Armed
from trady.model.python_state import PythonState
from trady.ops.selected import SelectedChannels, select_channels
from trady.quantized.linear import QuantizedLinear

_HEAD = "head"


@dataclass
class _Slices:
    """Channels of a layer, in turn as they were and, while the model is taken back, as they are."""

    layer: str
    channels: Channels
    outputs: Channels | None
    selected: SelectedChannels
    values: Tensor


class WeightSnapshot:
    """Follows what trains from one measurement to the next.

    Its memory is a copy of the channels that train and of the head; another one for every further draw between two
    measurements.

    Args:
        armed: The armed model.
        head: The parameters that always train.
    """

    def __init__(self, armed: Armed, head: Mapping[str, nn.Parameter]) -> None:
        self._armed, self._parameters = armed, dict(head)
        self._slices: list[_Slices] = []
        self._head: dict[str, Tensor] = {}
        self._begun = self._untrained = False

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*(each.values for each in self._slices), *self._head.values()]

    def begin(self) -> None:
        """From now on the weights of now are the earlier ones."""
        self._slices, self._head = [], {}
        self._head = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._begun = self._untrained = True
        self.drawn(self._armed.layers)

    def forget(self) -> None:
        """Let go of all that is kept."""
        self._slices, self._head, self._begun = [], {}, False

    def drawn(self, changed: Collection[str]) -> None:
        """Other channels train in these layers from now on."""
        if not self._begun:
            return
        if self._untrained:
            self._slices = []
            changed = self._armed.layers
        selection = self._armed.selection
        for name in changed:
            selected = self._armed.layers[name].selected
            if selected is not None:
                values = self._armed.layers[name].compact.detach().clone()
                outputs = selection.outputs.get(name)
                self._slices.append(_Slices(name, selection.channels[name], outputs, selected, values))

    def trained(self) -> None:
        """Weights may have changed."""
        self._untrained = False

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the earlier weights into the model for a while. Let it run untouched meanwhile."""
        self._armed.write_back()
        truths = [self._armed.layers[each.layer].truth for each in self._slices]
        # What is swapped in a quantised layer is kept in floating point beside it; it is no longer afterwards.
        before = PythonState([truth.module for truth in truths if isinstance(truth, QuantizedLinear)])
        try:
            for each in reversed(self._slices):
                self._swap(each)
            self._swap_head()
            yield
        finally:
            self._swap_head()
            for each in self._slices:
                self._swap(each)
            before.restore()
            self._armed.write_back()

    def _swap(self, each: _Slices) -> None:
        truth = self._armed.layers[each.layer].truth
        now = truth.gather(each.selected)
        truth.scatter_(each.selected, each.values)
        each.values.copy_(now)

    def _swap_head(self) -> None:
        for name, earlier in self._head.items():
            parameter = self._parameters[name].detach()
            now = parameter.clone()
            parameter.copy_(earlier)
            earlier.copy_(now)

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors and JSON values for :meth:`load`."""
        tensors = {f"{number}": each.values for number, each in enumerate(self._slices)}
        tensors.update({f"{_HEAD}/{name}": tensor for name, tensor in self._head.items()})
        meta = [
            {
                "layer": each.layer,
                "channels": each.channels.tolist(),
                "outputs": None if each.outputs is None else each.outputs.tolist(),
            }
            for each in self._slices
        ]
        return tensors, meta

    def load(self, tensors: Mapping[str, Tensor], meta: list[dict[str, Any]] | None) -> None:
        """Go on from :meth:`state`.

        Raises:
            CheckpointError: It is damaged.

        """
        if meta is None:
            raise CheckpointError("the checkpoint lacks the weights that were measured before; start a new run")
        try:
            slices = [self._read(each, tensors[f"{number}"]) for number, each in enumerate(meta)]
            head = {
                name: tensors[f"{_HEAD}/{name}"].to(parameter.device, copy=True)
                for name, parameter in self._parameters.items()
            }
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint is damaged ({error}); use an older one or start a new run"
            ) from error
        self._slices, self._head, self._begun, self._untrained = slices, head, True, False

    def _read(self, meta: Mapping[str, Any], values: Tensor) -> _Slices:
        layer = self._armed.table[meta["layer"]]
        armed = self._armed.layers[layer.name]
        channels = np.asarray(meta["channels"], dtype=np.int64)
        outputs = None if meta["outputs"] is None else np.asarray(meta["outputs"], dtype=np.int64)
        mistake = self._armed.table.mistake(
            Selection({layer.name: channels}, {} if outputs is None else {layer.name: outputs})
        )
        if mistake is not None:
            raise ValueError(f"its earlier weights are of {mistake}")
        a_group = layer.channels // layer.groups
        selected = select_channels(channels, layer.groups, a_group, armed.weight.device, outputs)
        if armed.truth.gather(selected).shape != values.shape:
            raise ValueError(f"{layer.name} has other earlier weights")
        return _Slices(layer.name, channels, outputs, selected, values.to(armed.weight.device, copy=True))
