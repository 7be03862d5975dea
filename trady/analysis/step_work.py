"""Multiply-adds of a training step, call by call: what runs forward, and how far its backward pass goes.

A gradient is computed for what needs one: the result of a call in which something trains, and of every call that reads
such a result. In front of the first call in which something trains the backward pass has nothing to do, so the work of
a step depends on where that is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trady.analysis.gradient_flow import ends_gradient, memory_of_values, reached_by_gradients
from trady.analysis.segments import Segment, work_of
from trady.calls.kinds import WeightCall
from trady.calls.names import name_of
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.trace.trace import Trace, TracedCall

#: Products of a fused attention's backward pass over those of its forward pass: it computes the scores once more, and
#: then the gradients of values, scores, queries and keys (``torch.utils.flop_counter`` counts it so, too).
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class StepWork:
    """Multiply-adds of a forward and backward pass over the example: of weight layers and matrix products, no others.

    Attributes:
        forward: Of the forward pass.
        input_gradients: Of gradients with respect to activations.
        weight_gradients: Of gradients with respect to weights, of the channels that train alone.
        recomputed: Of what the backward pass computes a second time, at most.
        stops_at: The layer that the backward pass ends at, the first one that trains; empty if none does.
        passed: Layers that the backward pass goes through, that one included.
    """

    forward: int
    input_gradients: int
    weight_gradients: int
    recomputed: int
    stops_at: str
    passed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.input_gradients + self.weight_gradients + self.recomputed


@dataclass(frozen=True)
class _Node:
    """A call as the backward pass sees it.

    Attributes:
        reads: Memory that it reads, by number.
        makes: Memory that it fills.
        work: Multiply-adds of its forward pass.
        weight: Identity of the weight that it applies; ``None`` for other calls.
        layer: Name of its layer, if channels of the weight can train.
        attends: Whether it is a fused attention.
        carries: Whether a gradient passes from what it makes to what it reads.
        head: Whether it reads a parameter of the head.
        trainable: Whether it reads a parameter that full fine-tuning would train.
        name: The module that it belongs to.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    work: int
    weight: int | None
    layer: str | None
    attends: bool
    carries: bool
    head: bool
    trainable: bool
    name: str


class WorkCounter:
    """Counts the work of steps of one model; holds none of its tensors.

    Args:
        trace: A forward pass in training mode.
        table: The layers of which channels can train.
        parameters: The model's parameters by name.
        head: Identities of the parameters that always train.
    """

    def __init__(
        self, trace: Trace, table: ChannelTable, parameters: Mapping[str, nn.Parameter], head: Collection[int]
    ) -> None:
        names = {id(parameters[layer.parameter]): layer.name for layer in table}
        memory, reached = memory_of_values(trace), reached_by_gradients(trace)
        self._table, self._memories = table, len(trace.values)
        self._nodes = [
            _node(trace, entry, memory, names, head, carries=reached[index] and not ends_gradient(entry))
            for index, entry in enumerate(trace.calls)
        ]
        self._forward = sum(node.work for node in self._nodes)
        self.full = self._count({}, (), everything=True)

    def channels(self, layer: str) -> int:
        """Number of input channels of a layer."""
        return self._table[layer].channels

    def of(self, selection: Selection, segments: Collection[Segment] = ()) -> StepWork:
        """Count a step in which these channels and the head train.

        Args:
            selection: The channels.
            segments: What the backward pass recomputes.

        """
        shares = {}
        for name, channels in selection.items():
            layer, outputs = self._table[name], selection.output_count(name)
            shares[name] = len(channels) / layer.channels * (1 if outputs is None else outputs / layer.outputs)
        return self._count(shares, segments)

    def reaching(self, layers: Collection[str], segments: Collection[Segment] = ()) -> StepWork:
        """Count a step whose backward pass reaches these layers, without the gradients of their weights."""
        return self._count(dict.fromkeys(layers, 0.0), segments)

    def _count(
        self, shares: Mapping[str, float], segments: Collection[Segment], *, everything: bool = False
    ) -> StepWork:
        needs = [False] * self._memories
        inputs = weights = 0.0
        stops_at, passed = "", set[int]()
        differentiated = []
        for index, node in enumerate(self._nodes):
            if not node.carries:
                continue
            share = 1.0 if everything and node.trainable else shares.get(node.layer or "")
            trains = share is not None or node.head
            needed = sum(needs[memory] for memory in node.reads)
            if not trains and not needed:
                continue
            differentiated.append(index)
            for memory in node.makes:
                needs[memory] = True
            stops_at = stops_at or node.layer or node.name
            if node.weight is not None:
                passed.add(node.weight)
                inputs += node.work * min(needed, 1)
                weights += node.work * ((share or 0.0) if share is not None else 1.0 if node.head else 0.0)
            elif node.attends:
                inputs += node.work * ATTENTION_BACKWARD
            else:
                inputs += node.work * min(needed, 2)
        again = sum(segment.work for segment in segments if _holds(segment, differentiated))
        counted = round(inputs), round(weights), again
        return StepWork(self._forward, *counted, stops_at, len(passed))


def _node(
    trace: Trace,
    entry: TracedCall,
    memory: list[int],
    names: Mapping[int, str],
    head: Collection[int],
    *,
    carries: bool,
) -> _Node:
    applied = entry.call.weight if isinstance(entry.call, WeightCall) else None
    weight = id(applied) if isinstance(applied, nn.Parameter) else None
    trainable = any(isinstance(p, nn.Parameter) and p.is_floating_point() for p in entry.parameters)
    return _Node(
        reads=_distinct(memory[value] for value in entry.reads),
        makes=_distinct(memory[value] for value in (*entry.makes, *entry.written) if value is not None),
        work=work_of(trace, entry),
        weight=weight,
        layer=None if weight is None else names.get(weight),
        attends=name_of(entry.function) == "scaled_dot_product_attention",
        carries=carries,
        head=any(id(parameter) in head for parameter in entry.parameters),
        trainable=trainable,
        name=entry.module,
    )


def _distinct(numbers: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(numbers))


def _holds(segment: Segment, calls: list[int]) -> bool:
    """Whether one of these calls, in order, is in a segment."""
    return any(segment.start <= call < segment.end for call in calls)
