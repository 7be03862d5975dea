"""Which values cross a cut between two calls, and what they carry."""

from __future__ import annotations

import math

import torch

from trady.calls.kinds import WeightCall
from trady.trace.trace import Trace, Value

#: A value that at least this many weight layers read is a context for all of them (an encoder's output): it may cross.
_CONTEXT_READERS = 5


class Crossing:
    """Which activations are alive between two calls."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        count = len(trace.calls)
        carries = self.carries = _carries_weights(trace)
        self._alive: list[list[int]] = [[] for _ in range(count + 1)]
        for index, value in enumerate(trace.values):
            last = max(value.readers, default=-1)
            if carries[index] and not self._is_context(value):
                for p in range(value.producer + 1, last + 1):
                    self._alive[p].append(index)
        # Names of one tensor (a view, the same object again) count once.
        self.sources = _sources(trace)

    def at(self, position: int) -> set[int]:
        """The memory that activations read at or behind ``position``, and made in front of it, lie in."""
        return {self.sources[v] for v in self._alive[position]}

    def single(self, position: int) -> bool:
        """Whether at most one tensor crosses, under one name (none at the end)."""
        return len(self._alive[position]) == 1 or position == len(self.trace.calls)

    def size(self, position: int) -> int:
        """Elements of what crosses."""
        return sum(math.prod(self.trace.values[v].shape) for v in self.at(position))

    def _is_context(self, value: Value) -> bool:
        weights = [r for r in value.readers if isinstance(self.trace.calls[r].call, WeightCall)]
        return len(weights) >= _CONTEXT_READERS


def _carries_weights(trace: Trace) -> list[bool]:
    """Which values a weight has gone into: masks, positions and angles have none and can always be handed in."""
    carries = [False] * len(trace.values)
    for entry in trace.calls:
        if entry.scope is None:
            continue
        tainted = any(isinstance(p, torch.nn.Parameter) for p in entry.parameters)
        tainted |= any(carries[v] for v in entry.reads)
        for value in entry.makes:
            carries[value] = tainted
    return carries


def _sources(trace: Trace) -> list[int]:
    """For every value the one whose memory it shows."""
    sources = list(range(len(trace.values)))
    for entry in trace.calls:
        for value in entry.makes:
            if trace.values[value].view and entry.reads and not isinstance(entry.call, WeightCall):
                sources[value] = sources[entry.reads[0]]
    return sources
