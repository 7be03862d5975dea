"""Peaks of steps of one model on one batch, each kind of step simulated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from trady.channels.selection import Selection
from trady.planning.recomputation import Planner, Recomputation
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.simulator import Simulator
from trady.simulation.timeline import Timeline


class Peaks:
    """Simulates the steps of a model. What it remembers changes no answer.

    Args:
        simulator: Makes the simulator when a peak is asked for, and not before: that copies the model's structure.
        planner: Chooses what is recomputed.
        accumulates: Whether the gradients of earlier chunks of a batch are there all along.
    """

    def __init__(self, simulator: Callable[[], Simulator], planner: Planner, *, accumulates: bool = False) -> None:
        self._make, self.planner, self.accumulates = simulator, planner, accumulates
        self._timelines: dict[tuple[object, ...], Timeline] = {}

    @cached_property
    def _simulator(self) -> Simulator:
        return self._make()

    @cached_property
    def inference_bytes(self) -> tuple[int, int]:
        """Bytes of weights, buffers and batch; and how far an inference pass climbs above them."""
        return self._simulator.inference_bytes()

    def timeline(self, layers: tuple[str, ...], choice: Recomputation, optimizer: OptimizerMemory) -> Timeline:
        """Simulate a step with one channel in each of these layers."""
        chosen = tuple((segment.start, segment.end) for segment in choice.segments.get(True, ()))
        key = (layers, chosen, optimizer.in_backward)
        if key not in self._timelines:
            self._timelines[key] = self._simulator.timeline(
                layers=layers, segments=choice.segments, optimizer=optimizer
            )
        return self._timelines[key]

    def parts(self, selection: Selection, choice: Recomputation, optimizer: OptimizerMemory) -> Mapping[str, int]:
        """Simulate a step with just these channels: what its peak is made of, in bytes, but for optimizer state."""
        return self._simulator.timeline(
            segments=choice.segments, selection=selection, parts=True, optimizer=optimizer
        ).parts
