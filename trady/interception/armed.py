"""A model with its interception in place and a set of channels that train.

``weight`` holds the truth (of a quantised layer with the float channels beside it:
:mod:`trady.quantized.linear`). Every layer has a compact parameter too, a leaf that holds the selected channels
``W[:, c]`` (or ``W[outputs][:, c]``) only:
it receives their gradient, the optimizer updates it, and it is written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trady.analysis.model_analysis import ModelAnalysis
from trady.analysis.segments import NO_SEGMENTS, Segments
from trady.channels.selection import Channels, Selection
from trady.channels.table import Layer
from trady.interception.frozen_flags import FrozenFlags
from trady.interception.interceptor import Interceptor
from trady.interception.layer import ArmedLayer, OnGradient
from trady.interception.shown_weights import ShownWeights
from trady.interception.writes import Writes
from trady.model.eager import Uncompiled, unwrap_compiled
from trady.model.prepared import prepared_modules, refuse_prepared
from trady.ops.quantized import is_quantized
from trady.ops.selected import select_channels
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

    @property
    def moves(self) -> tuple[tuple[Channels, int], tuple[Channels, int]]:
        """Sources and former number of the rows, and of the columns."""
        return (self.sources, self.rows_before), (self.columns, self.columns_before)


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
        segments: Segments = NO_SEGMENTS,
        fidelity: str = "exact",
    ) -> None:
        refuse_prepared(model)
        self.given, self.model, self.table = model, unwrap_compiled(model), analysis.table
        model = self.model
        head = {id(p) for p in analysis.head_parameters.values()}
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(id(parameter) in head)
        self._quantized = route(model)
        #: Called with (layer, compact parameter) whenever the gradient of a layer's channels has arrived.
        self.on_gradient: list[OnGradient] = []
        #: Called with a module and its arguments before every forward pass, when the weights are up to date.
        self.on_forward: list[Callable[[nn.Module, Any, Any], None]] = []
        #: Called with a module and what it returned after every forward pass.
        self.on_output: list[Callable[[nn.Module, Any], None]] = []
        self.layers = {layer.name: ArmedLayer(layer, model, self._quantized, self.on_gradient) for layer in self.table}
        self.selection = Selection()
        self._writes = Writes()
        self.shown = ShownWeights(self.layers.values())
        weights = {id(layer.weight) for layer in self.layers.values()}
        self.frozen = FrozenFlags(p for p, flag in self._flags if flag and id(p) not in head | weights)
        self.interceptor = Interceptor(
            model,
            list(self.layers.values()),
            analysis.plans,
            head,
            segments,
            fidelity=fidelity,
            before_forward=self._before_forward,
            after_forward=self._after_forward,
            weights=self.shown,
        )
        self.interceptor.arm()
        self._uncompiled = Uncompiled(self.given)
        frozen = frozenset(id(p) for p, flag in self._flags if not flag and not is_quantized(p))
        self._modules = list(model.modules())  # some models put others in their place when they first run
        prepared_modules.update(dict.fromkeys(self._modules, frozen))

    def select(self, selection: Selection) -> list[Change]:
        """Make ``selection`` the channels that train; return how the compact parameters changed."""
        self.write_back()
        self._writes = Writes()  # it holds the memory of the compact parameters
        changes = []
        for name, armed in self.layers.items():
            layer = self.table[name]
            before, columns_before = _rows_and_columns(self.selection, layer)
            now, columns = _rows_and_columns(selection, layer)
            if np.array_equal(before, now) and np.array_equal(columns_before, columns):
                continue
            selected = None
            if len(now):
                groups, outputs = layer.groups, selection.outputs.get(name)
                selected = select_channels(now, groups, layer.channels // groups, armed.weight.device, outputs)
            armed.select(selected, by_output=name in selection.outputs)
            moved = _sources(before, now), len(before), _sources(columns_before, columns), len(columns_before)
            changes.append(Change(name, armed.compact, *moved))
        self.selection = selection
        self._writes = Writes(self.layers.values())
        self._writes.note(self.layers[change.layer] for change in changes)
        self.shown.drawn()
        return changes

    @property
    def float_channels(self) -> Selection:
        """Channels of quantised layers that are in floating point beside the weight: those that have trained."""
        truths = {name: armed.truth for name, armed in self.layers.items()}
        kept = {name: truth.channels for name, truth in truths.items() if isinstance(truth, QuantizedLinear)}
        return Selection({name: found[0].cpu().numpy() for name, found in kept.items() if found is not None})

    @property
    def indices(self) -> list[Tensor]:
        """The indices of the channels that train."""
        chosen = (layer.selected for layer in self.layers.values())
        return [tensor for selected in chosen if selected is not None for tensor in selected.tensors]

    def write_back(self) -> None:
        """Copy the compact parameters that an optimizer has changed into the weights.

        Where it is the weight that was changed (somebody loaded a checkpoint), the compact parameter follows.
        """
        self._writes.write_back()

    def follow(self) -> None:
        """Let weights and compact parameters be the same where somebody wrote into one of them, in whatever way."""
        self._writes.follow()

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        if not torch.is_grad_enabled() and any(armed.is_replaced for armed in self.layers.values()):
            return False
        self.frozen.follow()
        self.write_back()
        self._writes.hear_last()
        for call in self.on_forward:
            call(module, args, kwargs)
        return True

    def _after_forward(self, module: nn.Module, output: Any) -> None:
        for call in self.on_output:
            call(module, output)

    @contextmanager
    def gated(self, samples: int) -> Iterator[Mapping[str, Tensor]]:
        """Put gates (:mod:`trady.ops.gates`) in the place of the selected channels' weights for a while.

        Args:
            samples: Samples of the batches that follow.

        Yields:
            Layer name to its gates ``[n, samples]``, which receive their gradient as leaves do.

        """
        with ExitStack() as stack:
            gates = {name: stack.enter_context(armed.gated(samples)) for name, armed in self.layers.items()}
            yield {name: gate for name, gate in gates.items() if gate is not None}

    def disarm(self) -> None:
        """Write back, let go of the channels, take out the hooks, restore the flags."""
        try:
            self.write_back()
        finally:
            self._writes = Writes()
            self.shown.end()
            self.frozen.end()
            self.interceptor.disarm()
            self._uncompiled.put_back()
            leave(self._quantized)
            self.on_gradient.clear()
            self.on_forward.clear()
            self.on_output.clear()
            for armed in self.layers.values():  # an optimizer that a person goes on holding holds no channels
                armed.select(None, by_output=False)
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
            for module in self._modules:
                prepared_modules.pop(module, None)


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
