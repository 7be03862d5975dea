"""Which calls of a forward pass a gradient can reach: not what runs without gradients or is detached."""

from __future__ import annotations

import torch

from trady.calls.kinds import WeightCall
from trady.calls.names import name_of
from trady.trace.trace import Trace, TracedCall

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]

#: Functions whose result has no gradient.
_ENDS_NAMES = """
    detach argmax argmin argsort eq ne lt le gt ge isnan isinf isfinite isclose logical_and logical_or logical_not
    nonzero bucketize searchsorted
"""

_ENDS = frozenset(_ENDS_NAMES.split())


def reached_by_gradients(trace: Trace) -> list[bool]:
    """Whether a gradient may reach each call of a trace.

    Gradients start at what is there when the pass has ended, and at what nobody reads, for a wrapper may have handed it
    on unseen. They pass through every call that reads tensors, but for those that end them. What shares memory counts
    as one, so a call may be counted that no gradient reaches, and none is missed.
    """
    memory = memory_of_values(trace)
    with_gradient = {
        memory[index] for index, value in enumerate(trace.values) if value.kept or not (value.readers or value.replaced)
    }
    reached = [False] * len(trace.calls)
    for index in reversed(range(len(trace.calls))):
        entry = trace.calls[index]
        if entry.without_gradient or entry.auxiliary:
            continue
        touched = [*entry.makes, *entry.written]
        reached[index] = entry.in_function or any(v is None or memory[v] in with_gradient for v in touched)
        if reached[index] and not ends_gradient(entry):
            with_gradient.update(memory[value] for value in entry.reads)
    return reached


def ends_gradient(entry: TracedCall) -> bool:
    """Whether the result of a call has no gradient, whatever it reads."""
    return entry.function == _DATA or name_of(entry.function) in _ENDS


def memory_of_values(trace: Trace) -> list[int]:
    """For every value the first one that has its memory, and its graph."""
    memory = list(range(len(trace.values)))
    for entry in trace.calls:
        for value in entry.makes:
            made = trace.values[value]
            if made.same_as is not None:
                memory[value] = memory[made.same_as]
            elif made.view and entry.reads and _may_be_view(entry):
                memory[value] = memory[entry.reads[0]]
    return memory


def _may_be_view(entry: TracedCall) -> bool:
    """Whether a result that shares memory may share that of what was read: a layer's is a view of its own product."""
    return not (isinstance(entry.call, WeightCall) or ends_gradient(entry) or entry.without_gradient)
