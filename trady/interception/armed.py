"""A model with its interception in place and a set of channels that train.

``weight`` holds the truth (of a quantised layer with the float channels beside it:
:mod:`trady.quantized.linear`). Every layer has a compact parameter too, a leaf that holds the selected channels
``W[:, c]`` (or ``W[outputs][:, c]``) only:
it receives their gradient, the optimizer updates it, and it is written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from trady.analysis.model_analysis import ModelAnalysis
from trady.analysis.segments import Segment
from trady.channels.selection import Channels, Selection
from trady.channels.table import Layer
from trady.errors import StateError
from trady.interception.deferred_segment import came_too_late
from trady.interception.interceptor import Interceptor
from trady.interception.layer import ArmedLayer
from trady.model.eager import Uncompiled, unwrap_compiled
from trady.model.prepared import prepared_modules, refuse_prepared
from trady.ops.selected import DenseWeight, select_channels
from trady.optim.clipping import clip_by_output
from trady.quantized.linear import QuantizedLinear, leave, route


@dataclass(frozen=True)
class Change:
    """How a layer's compact parameter changed: new row ``i`` was row ``sources[i]``, or -1 is new; columns likewise.

    Rows are input channels, columns output channels (of a group).
    """

    layer: str
    compact: nn.Parameter
    sources: Channels
    rows_before: int
    columns: Channels
    columns_before: int


class Armed:
    """Hooks, flags and compact parameters of one model. Everything here is undone by :meth:`disarm`.

    Attributes:
        given: The model that is to be armed, maybe compiled.
        model: The same without what ``torch.compile`` has put around it.
    """

    def __init__(
        self,
        model: nn.Module,
        analysis: ModelAnalysis,
        segments: Mapping[bool, Sequence[Segment]] | None = None,
        fidelity: str = "exact",
    ) -> None:
        refuse_prepared(model)
        self.given, self.model, self.table = model, unwrap_compiled(model), analysis.table
        model = self.model
        plain = {id(p) for p in analysis.head_parameters.values()}
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(id(parameter) in plain)
        self._quantized = route(model)
        self.layers: dict[str, ArmedLayer] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for layer in self.table:
            weight = model.get_parameter(layer.parameter)
            path, _, attribute = layer.parameter.rpartition(".")
            self._owners[layer.name] = (model.get_submodule(path), attribute)
            truth = self._quantized.get(id(weight)) or DenseWeight(weight, layer.kind, layer.groups)
            self.layers[layer.name] = ArmedLayer(layer.name, weight, truth, nn.Parameter(truth.empty()))
        #: Called with (layer, compact parameter) whenever the gradient of a layer's channels has arrived.
        self.on_gradient: list[Callable[[str, nn.Parameter], None]] = []
        self.selection = Selection()
        self._written: dict[str, tuple[int, int]] = {}
        self.interceptor = Interceptor(model, list(self.layers.values()), analysis.plans, plain, segments)
        self.interceptor.fidelity = fidelity
        self.interceptor.before_forward = self.write_back
        self.interceptor.arm()
        self._uncompiled = Uncompiled(self.given)
        prepared_modules.update(model.modules())

    def select(self, selection: Selection) -> list[Change]:
        """Make ``selection`` the channels that train; return how the compact parameters changed."""
        self.write_back()
        changes = []
        for name, armed in self.layers.items():
            layer = self.table[name]
            before, columns_before = _rows_and_columns(self.selection, layer)
            now, columns = _rows_and_columns(selection, layer)
            if np.array_equal(before, now) and np.array_equal(columns_before, columns):
                continue
            if len(now):
                groups, outputs = layer.groups, selection.outputs.get(name)
                armed.selected = select_channels(now, groups, layer.channels // groups, armed.weight.device, outputs)
                armed.compact.data = armed.truth.gather(armed.selected)
            else:
                armed.selected = None
                armed.compact.data = armed.truth.empty()
            armed.compact.grad = None
            clip_by_output(armed.compact, name in selection.outputs)
            armed.leaf = self._new_leaf(name) if len(now) else None
            self._written[name] = armed.versions
            moved = _sources(before, now), len(before), _sources(columns_before, columns), len(columns_before)
            changes.append(Change(name, armed.compact, *moved))
        self.selection = selection
        return changes

    @property
    def float_channels(self) -> Selection:
        """Channels of quantised layers that are in floating point beside the weight: those that have trained."""
        truths = {name: armed.truth for name, armed in self.layers.items()}
        kept = {name: truth.channels for name, truth in truths.items() if isinstance(truth, QuantizedLinear)}
        return Selection({name: found[0].cpu().numpy() for name, found in kept.items() if found is not None})

    def write_back(self) -> None:
        """Copy the compact parameters that an optimizer has changed into the weights.

        Where it is the weight that was changed (somebody loaded a checkpoint), the compact parameter follows.
        """
        for name, armed in self.layers.items():
            if armed.selected is None:
                continue
            owner, attribute = self._owners[name]
            now = owner._parameters.get(attribute)
            if now is not armed.weight or now.device != armed.compact.device:
                raise StateError(
                    f"the weight of {name} was moved or replaced after the model had been prepared: "
                    "do that first, then call trady.prepare and build the optimizer"
                )
            if self._written[name] == armed.versions:
                continue
            with torch.no_grad():
                if self._written[name][0] == armed.compact._version:
                    armed.compact.copy_(armed.truth.gather(armed.selected))
                else:
                    armed.truth.scatter_(armed.selected, armed.compact.detach())
            self._written[name] = armed.versions

    @contextmanager
    def gated(self, samples: int) -> Iterator[Mapping[str, Tensor]]:
        """Put gates (:mod:`trady.ops.gates`) in the place of the selected channels' weights for a while.

        Args:
            samples: Samples of the batches that follow.

        Yields:
            Layer name to its gates ``[n, samples]``, which receive their gradient as leaves do.

        """
        before = {name: (armed.leaf, armed.selected) for name, armed in self.layers.items()}
        gates = {}
        for name, armed in self.layers.items():
            if armed.selected is not None:
                one = armed.compact.detach().new_ones(())
                armed.leaf = gates[name] = one.expand(len(armed.selected), samples).requires_grad_()
                armed.selected = replace(armed.selected, gates=samples)
        try:
            yield gates
        finally:
            for name, armed in self.layers.items():
                armed.leaf, armed.selected = before[name]

    def _new_leaf(self, name: str) -> Tensor:
        armed = self.layers[name]
        leaf = armed.compact.detach().requires_grad_()

        def deliver(leaf: Tensor) -> None:
            if armed.leaf is not leaf:
                raise StateError(came_too_late(name))
            gradient, leaf.grad, compact = leaf.grad, None, armed.compact
            if compact.grad is None:
                compact.grad = gradient
            elif gradient is not None:
                compact.grad.add_(gradient)
            for callback in self.on_gradient:
                callback(name, compact)

        leaf.register_post_accumulate_grad_hook(deliver)
        return leaf

    def disarm(self) -> None:
        """Write back, take out the hooks, restore the flags."""
        try:
            self.write_back()
        finally:
            self.interceptor.disarm()
            self._uncompiled.put_back()
            leave(self._quantized)
            self.on_gradient.clear()
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
            prepared_modules.difference_update(self.model.modules())


def _rows_and_columns(selection: Selection, layer: Layer) -> tuple[Channels, Channels]:
    """Input channels of a layer that train, and output channels (of a group)."""
    rows = selection.channels.get(layer.name, np.empty(0, dtype=np.int64))
    every = np.arange(layer.outputs // layer.groups, dtype=np.int64)
    return rows, selection.outputs.get(layer.name, every)


def _sources(before: Channels, now: Channels) -> Channels:
    """For every channel of ``now`` its place among ``before``, or -1; both are sorted."""
    if not len(before):
        return np.full(len(now), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(before, now), len(before) - 1)
    return np.where(before[place] == now, place, -1)
