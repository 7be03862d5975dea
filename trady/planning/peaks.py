"""Peaks of steps of one model, each kind of step simulated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.recomputation import Planner, Recomputation
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.simulator import Simulator
from trady.simulation.timeline import Timeline


class Case:
    """Steps under one set of conditions. What it remembers changes no answer.

    Args:
        simulator: Makes the simulator when a peak is asked for, and not before: that copies the model's structure.
        table: What channels cost in such a step.
        accumulates: Whether the gradients of earlier passes are there all along.
    """

    def __init__(self, simulator: Callable[[], Simulator], table: ChannelTable, *, accumulates: bool = False) -> None:
        self._make, self.table, self.accumulates = simulator, table, accumulates
        self._timelines: dict[tuple[object, ...], Timeline] = {}

    @cached_property
    def _simulator(self) -> Simulator:
        return self._make()

    @cached_property
    def inference_bytes(self) -> tuple[int, int]:
        """Bytes of weights, buffers and batch; and how far an inference pass climbs above them."""
        return self._simulator.inference_bytes()

    def accumulating(self) -> Case:
        """Return the same steps with the gradients of earlier passes there; nothing is simulated twice."""
        case = Case(lambda: self._simulator, self.table, accumulates=True)
        case._timelines = self._timelines
        return case

    def timeline(self, layers: tuple[str, ...], choice: Recomputation, optimizer: OptimizerMemory) -> Timeline:
        """Simulate a step with one channel in each of these layers."""
        chosen = tuple((segment.start, segment.end) for segment in choice.segments.training)
        key = (layers, chosen, optimizer.in_backward)
        if key not in self._timelines:
            self._timelines[key] = self._simulator.timeline(
                layers=layers, segments=choice.segments, optimizer=optimizer
            )
        found = self._timelines[key]
        return replace(found, accumulates=True) if self.accumulates else found

    def parts(self, selection: Selection, choice: Recomputation, optimizer: OptimizerMemory) -> Mapping[str, int]:
        """Simulate a step with just these channels: what its peak is made of, in bytes, but for optimizer state."""
        return self._simulator.timeline(
            segments=choice.segments, selection=selection, parts=True, optimizer=optimizer, again=self.accumulates
        ).parts


class Peaks:
    """The steps that are to fit: of the example, and of what else a loop has been seen to do.

    Args:
        cases: The steps; the first is that of the example.
        planner: Chooses what is recomputed.
    """

    def __init__(self, cases: tuple[Case, ...], planner: Planner) -> None:
        self.cases, self.planner = cases, planner

    def also(self, case: Case) -> Peaks:
        """Return the same with a further case."""
        return self if case in self.cases else Peaks((*self.cases, case), self.planner)

    @property
    def inference_bytes(self) -> tuple[int, int]:
        """Bytes of weights, buffers and batch; and how far an inference pass climbs above them."""
        return self.cases[0].inference_bytes

    def timeline(self, layers: tuple[str, ...], choice: Recomputation, optimizer: OptimizerMemory) -> Timeline:
        """Simulate a step of every case with one channel in each of these layers."""
        first, *beside = (case.timeline(layers, choice, optimizer) for case in self.cases)
        return replace(first, beside=tuple(beside)) if beside else first

    def parts(self, selection: Selection, choice: Recomputation, optimizer: OptimizerMemory) -> Mapping[str, int]:
        """Simulate a step with just these channels: what the peak of the largest case is made of, in bytes."""
        found = (case.parts(selection, choice, optimizer) for case in self.cases)
        return max(found, key=lambda parts: sum(parts.values()))
