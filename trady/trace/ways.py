"""Where a forward pass may go another way, read off passes that did."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trady.trace.trace import Trace, TracedCall


def note_other_ways(trace: Trace, others: Sequence[Trace]) -> None:
    """Add the places where other passes of the model have left this one to its decisions.

    A model may draw its numbers long before it decides by them, or decide by what it keeps in Python. Where a module
    was left out, others that lie beside it (the layers of an encoder) may be left out as well.
    """
    found = {place for other in others for place in _departures(trace, other)}
    outermost = {start: name for name, start, _ in trace.spans if name}  # modules end from the inside outwards
    parents = {outermost[place].rpartition(".")[0] for place in found if place in outermost}
    found |= {start for name, start, _ in trace.spans if name and name.rpartition(".")[0] in parents}
    trace.decisions = tuple(sorted(found.union(trace.decisions)))


def _departures(trace: Trace, other: Trace) -> set[int]:
    """The calls in front of which another pass has left this one."""
    found: set[int] = set()
    calls, here = trace.calls, 0
    places: dict[object, list[int]] = {}
    for index, entry in enumerate(calls):
        places.setdefault(_key(entry), []).append(index)
    for entry in other.calls:
        key = _key(entry)
        if here < len(calls) and _key(calls[here]) == key:
            here += 1
            continue
        found.add(here)
        ahead = next((place for place in places.get(key, ()) if place > here), None)
        if ahead is not None:
            here = ahead + 1
    if here < len(calls):
        found.add(here)
    return found


def _key(entry: TracedCall) -> object:
    parameters = tuple(id(p) for p in entry.parameters if isinstance(p, nn.Parameter))
    return entry.function, parameters, entry.module
