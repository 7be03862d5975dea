"""What a training step does with the model, as far as its memory depends on it: planned, or seen in a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from trady.analysis.layers import build_table
from trady.analysis.model_analysis import ModelAnalysis
from trady.channels.table import ChannelTable, Layer
from trady.errors import BudgetError
from trady.model.batch import Batch, PackedBatch
from trady.model.untouched import apart
from trady.ops.context import simulated_autocast
from trady.planning.peaks import Case
from trady.simulation.simulator import ExampleLoss, Simulator
from trady.trace.forward import trace_forward

#: Shapes of the tensors of a batch, in order.
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Conditions:
    """Which forward passes a step makes.

    Attributes:
        calls: Shapes of the batch of each forward pass before a backward pass.
        accumulates: Whether the gradients of earlier passes are there when a forward pass begins.
        autocast: What forward passes compute in under autocast; ``None`` is without it.
    """

    calls: tuple[Shapes, ...]
    accumulates: bool = False
    autocast: torch.dtype | None = None

    def covers(self, other: Conditions) -> bool:
        """Whether a step under the other conditions takes no more than one under these."""
        if self.autocast != other.autocast or other.accumulates > self.accumulates:
            return False
        if len(other.calls) > len(self.calls):
            return False
        return all(map(_at_least, self.calls, other.calls))


def shapes_of(batch: Batch) -> Shapes:
    """Return the shapes of a batch."""
    return tuple(tuple(tensor.shape) for tensor in batch.tensors)


def _at_least(one: Shapes, other: Shapes) -> bool:
    if len(one) != len(other):
        return False
    return all(
        len(a) == len(b) and all(m >= n for m, n in zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Loop:
    """Predicts steps of one model under any conditions.

    Attributes:
        model: The model, uncompiled.
        analysis: What the example has shown of it.
        planned: What the plan is for.
        told: Whether the autocast of the loop was told, and need not be looked for: wrappers switch it on too late.
        fidelity: How exactly smooth activations that are kept are differentiated.
        waiting_bytes: Bytes of a larger batch, and of batches read ahead, that wait while the model works.
        loss: What the step makes of the output of the example.
        batches_ahead: Batches that a loader has read beside the one of the step.
        batch_bytes: Of one batch.
    """

    model: nn.Module
    analysis: ModelAnalysis
    planned: Conditions
    fidelity: str = "exact"
    waiting_bytes: int = 0
    loss: ExampleLoss | None = None
    told: bool = False
    batches_ahead: int = 0
    batch_bytes: int = 0

    @property
    def read_ahead_bytes(self) -> int:
        """What a loader holds beside the batch of a step."""
        return self.batches_ahead * self.batch_bytes

    def case(self, batches: Sequence[Batch], conditions: Conditions) -> Case:
        """Return steps under these conditions, to be simulated when their peak is asked for.

        Args:
            batches: What the forward passes get; their values are not kept, but for ids and masks.
            conditions: The same in shapes.

        Raises:
            ModelError: The model cannot be traced on a batch.
        """
        table = self.table_of(batches, conditions)
        first, *further = (batch.packed for batch in batches)
        known = conditions.calls[:1] == self.planned.calls[:1] and not further
        simulator = self._simulator(first, further, table, conditions.autocast, self.loss if known else None)
        return Case(simulator, table, accumulates=conditions.accumulates)

    def inference_bytes(self, batch: Batch) -> int:
        """The peak of an inference pass of the plain model on a batch, weights included."""
        with apart():
            return sum(Simulator(self.model, batch, self.analysis).inference_bytes())

    def table_of(self, batches: Sequence[Batch], conditions: Conditions) -> ChannelTable:
        """Return what channels cost in a step: the layers and their order are those of the example.

        Raises:
            ModelError: The model cannot be traced on a batch.
        """
        tables: dict[Shapes, ChannelTable] = {}
        for batch in batches:
            if shapes_of(batch) not in tables:
                tables[shapes_of(batch)] = self._table(batch, conditions.autocast)
        return _of_all([tables[shapes_of(batch)] for batch in batches])

    def _table(self, batch: Batch, autocast: torch.dtype | None) -> ChannelTable:
        table, dtype = self.analysis.table, autocast or batch.dtype_in(self.model)
        if shapes_of(batch) == self.planned.calls[0]:
            return replace(table, element_bytes=dtype.itemsize)
        with simulated_autocast(autocast):
            trace = trace_forward(self.model, batch, training=True)
        plans, head = self.analysis.plans.training, self.analysis.head
        found = {layer.parameter: layer for layer in build_table(self.model, trace, plans, head, dtype)}
        layers = tuple(_as_found(layer, found.get(layer.parameter)) for layer in table)
        return replace(table, layers=layers, batch=trace.batch, element_bytes=dtype.itemsize)

    def _simulator(
        self,
        first: PackedBatch,
        further: Sequence[PackedBatch],
        table: ChannelTable,
        autocast: torch.dtype | None,
        loss: ExampleLoss | None,
    ) -> Callable[[], Simulator]:
        return lambda: Simulator(
            self.model,
            first.unpack(),
            replace(self.analysis, table=table),
            fidelity=self.fidelity,
            waiting_bytes=self.waiting_bytes,
            loss=loss,
            further=[each.unpack() for each in further],
            autocast=autocast,
        )


def _as_found(layer: Layer, found: Layer | None) -> Layer:
    if found is None:  # this batch takes another way through the model
        return replace(layer, activation_elements=0, flops=0, input_shapes=(), output_shapes=())
    return replace(found, name=layer.name)


def _of_all(tables: Sequence[ChannelTable]) -> ChannelTable:
    """The table of several forward passes: what a channel keeps of all of them, and what the largest computes with."""
    if len(tables) == 1:
        return tables[0]
    largest = max(tables, key=lambda table: sum(layer.activation_elements for layer in table) * table.batch)

    def kept(layer: Layer) -> int:
        elements = sum(table[layer.name].activation_elements * table.batch for table in tables)
        return -(-elements // largest.batch)

    layers = tuple(replace(layer, activation_elements=kept(layer)) for layer in largest)
    return replace(largest, layers=layers)


def costlier(one: ChannelTable, other: ChannelTable) -> ChannelTable:
    """Return a table in which every channel costs what it does in the costlier of the two.

    Args:
        one: A table.
        other: Another one of the same layers, in the same order.
    """
    largest = max(one.batch, other.batch)

    def cost(table: ChannelTable, layer: Layer) -> int:
        return -(-table[layer.name].activation_elements * table.batch * table.element_bytes // largest)

    element = max(one.element_bytes, other.element_bytes)
    layers = tuple(
        replace(layer, activation_elements=-(-max(cost(one, layer), cost(other, layer)) // element)) for layer in one
    )
    return replace(one, layers=layers, batch=largest, element_bytes=element)


#: What happens when a step would take more than the budget.
OVER_BUDGET = ("adapt", "refuse", "warn")


def check_conditions(calls_per_step: int, over_budget: str, batches_ahead: int = 0) -> None:
    """Refuse a number of forward passes or batches that is none, and a word that is not known.

    Raises:
        BudgetError: The message says what to type.
    """
    if over_budget not in OVER_BUDGET:
        raise BudgetError(f"over_budget={over_budget!r} is not known; type one of {', '.join(OVER_BUDGET)}")
    if type(calls_per_step) is not int or calls_per_step < 1:
        raise BudgetError(f"calls_per_step={calls_per_step!r}: type how often the model is called before backward()")
    if type(batches_ahead) is not int or batches_ahead < 0:
        raise BudgetError(f"batches_ahead={batches_ahead!r}: type how many batches a loader holds beside the step's")
