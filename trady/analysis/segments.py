"""Segments of a forward pass between two points that a single activation crosses: what can be recomputed.

Of such a segment only the activation that enters it has to be kept: the backward pass recomputes it, a
few samples at a time where its calls treat samples one by one (Chen et al., arXiv 1604.06174, checkpoint
whole segments; here the points are found in the trace, and no segment is ever alive as a whole).
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from trady.analysis.fusion import FusionPlan
from trady.analysis.liveness import Crossing
from trady.analysis.sample_axes import CallSamples
from trady.calls.kind import Keeps
from trady.calls.kinds import WeightCall
from trady.calls.names import (
    BACKWARD_READS_BOTH,
    BACKWARD_READS_NOTHING,
    BACKWARD_READS_RESULT,
    PRODUCT_NAMES,
    name_of,
)
from trady.calls.recognize import kind_of
from trady.model.mode import ByMode
from trady.trace.trace import Trace, TracedCall

#: A segment is worth it if it keeps this many times what has to be kept instead.
_MINIMUM_GAIN = 1.5

#: Of what the model still holds when its forward pass has ended.
ALWAYS = sys.maxsize

#: Of calls that do not belong to a segment.
_NO_SAMPLES = CallSamples((), (), ())


@dataclass(frozen=True)
class Segment:
    """A segment of calls that can be recomputed as a whole.

    Attributes:
        start: Its first call.
        end: One past its last call.
        outputs: What it hands on: pairs of a call and the place among what that call returns.
        needed_until: For each of these the last call that reads it; :data:`ALWAYS` if the model keeps it.
        samples: Where the samples lie, one entry a call; empty if it cannot be computed in chunks.
        kept_bytes: About what it keeps for its backward pass if it is not recomputed, for the traced batch.
        entry_bytes: The activation that crosses its start, which is kept instead.
        work: Multiply-adds of its forward pass.
        name: The module it belongs to.
        auxiliary: Calls between that do not belong to it: what they make of ids and masks is handed in.
        joins: Whether it can be joined to the one in front: the model decides nothing in between.
    """

    start: int
    end: int
    outputs: tuple[tuple[int, int], ...]
    needed_until: tuple[int, ...]
    samples: tuple[CallSamples, ...]
    kept_bytes: int
    entry_bytes: int
    work: int
    name: str
    auxiliary: frozenset[int] = frozenset()
    joins: bool = True

    @property
    def first(self) -> int:
        """Its first call that is not auxiliary."""
        return next(index for index in range(self.start, self.end) if index not in self.auxiliary)

    @property
    def last(self) -> int:
        """Its last call that is not auxiliary."""
        return next(index for index in reversed(range(self.start, self.end)) if index not in self.auxiliary)


def find_segments(
    trace: Trace, plan: FusionPlan, samples: list[CallSamples | None], element_bytes: int
) -> tuple[Segment, ...]:
    """Cut a forward pass where a single activation crosses.

    Args:
        trace: The forward pass.
        plan: How its calls are computed: what is computed together is not cut apart.
        samples: Where the samples lie in its calls (:func:`trady.analysis.sample_axes.samples_of`).
        element_bytes: Bytes of an activation's element.

    """
    crossing = Crossing(trace)
    cuts = [p for p in range(len(trace.calls) + 1) if crossing.single(p) and not _inside_fused(plan, p)]
    found = []
    for start, end in _segments_between(trace, cuts, crossing):
        segment = _segment(trace, start, end, samples, element_bytes, crossing)
        if segment is not None:
            found.append(segment)
    return tuple(found)


def merged(segments: tuple[Segment, ...], count: int, most: int | None = None) -> tuple[Segment, ...]:
    """Join up to ``count`` neighbours into one: fewer activations are kept, more is recomputed.

    Args:
        segments: The segments, in order.
        count: Neighbours in one.
        most: Joins to make, from the front; ``None`` is all.

    """
    joined: list[Segment] = []
    size, left = 0, len(segments) if most is None else most
    for segment in segments:
        last = joined[-1] if joined else None
        if last is not None and last.end == segment.start and size < count and left > 0 and _may_join(last, segment):
            joined[-1] = _join(last, segment)
            size += 1
            left -= 1
        else:
            joined.append(segment)
            size = 1
    return tuple(joined)


def _may_join(first: Segment, second: Segment) -> bool:
    if bool(first.samples) != bool(second.samples) or not second.joins:
        return False
    # A loss is summed up over the chunks, which has to be the last call.
    return not first.samples or all(first.samples[c - first.start].outputs[p] is not None for c, p in first.outputs)


def _join(first: Segment, second: Segment) -> Segment:
    """One segment of two: it no longer hands on what only the second one reads."""
    handed_on = [
        *((o, until) for o, until in zip(first.outputs, first.needed_until, strict=True) if until >= second.end),
        *zip(second.outputs, second.needed_until, strict=True),
    ]
    return replace(
        first,
        end=second.end,
        outputs=tuple(output for output, _ in handed_on),
        needed_until=tuple(until for _, until in handed_on),
        samples=first.samples + second.samples,
        kept_bytes=first.kept_bytes + second.kept_bytes + second.entry_bytes,
        work=first.work + second.work,
        auxiliary=first.auxiliary | second.auxiliary,
    )


def _inside_fused(plan: FusionPlan, position: int) -> bool:
    return any(step.first < position <= step.last for step in plan.steps if step.action is not None)


def _segments_between(trace: Trace, cuts: list[int], crossing: Crossing) -> list[tuple[int, int]]:
    """Join what lies between cuts until every segment is worth recomputing.

    A point counts if more is alive inside of the segment than crosses its ends: chains of calls between
    activations of one size have nothing to gain.
    """
    segments: list[tuple[int, int]] = []
    apart = True  # whether nothing can be joined to what is in front
    for start, end in pairwise(cuts):
        if _decides(trace, start, end):
            apart = True
            continue
        if apart or start in trace.decisions:
            segments.append((start, end))
            apart = False
            continue
        branches = any(len(crossing.at(p)) > 1 for p in range(start + 1, end))
        if branches:
            segments.append((start, end))
        elif _owner(trace, start) == _owner(trace, segments[-1][0]) or _is_tail(trace, start, end):
            segments[-1] = (segments[-1][0], end)
        else:
            segments.append((start, end))
    return segments


def _decides(trace: Trace, start: int, end: int) -> bool:
    """Whether a model looks at values between two points, or decides there to go on in one way or another."""
    inside = bisect_right(trace.decisions, start) < bisect_left(trace.decisions, end)
    return inside or any(entry.looks for entry in trace.calls[start:end])


def _owner(trace: Trace, index: int) -> str:
    return trace.calls[index].container


def _is_tail(trace: Trace, start: int, end: int) -> bool:
    return all(not isinstance(trace.calls[i].call, WeightCall) for i in range(start, end))


def _segment(
    trace: Trace,
    start: int,
    end: int,
    samples: list[CallSamples | None],
    element_bytes: int,
    crossing: Crossing,
) -> Segment | None:
    calls = trace.calls[start:end]
    has_weights = any(isinstance(c.call, WeightCall) and isinstance(c.call.weight, torch.nn.Parameter) for c in calls)
    if not has_weights or any(c.scope != "" for c in calls) or not crossing.at(start):
        return None
    if any(_writes_outside(trace, entry, start, crossing.sources) for entry in calls if not entry.auxiliary):
        return None
    if _auxiliary_writes_what_is_read(calls, crossing.sources):
        return None
    outputs: dict[tuple[int, int], int] = {}
    for value in (value for entry in calls if not entry.auxiliary for value in entry.makes):
        until = ALWAYS if trace.values[value].kept else max(trace.values[value].readers, default=-1)
        if trace.decided_after(value, end):
            until = ALWAYS  # on another way, somebody else may read it
        if until >= end:
            first = _first_made(trace, value, start)
            outputs[first] = max(until, outputs.get(first, 0))
    if not outputs or any(index < start for index, _ in outputs):
        return None
    auxiliary = frozenset(index for index in range(start, end) if trace.calls[index].auxiliary)
    found = [_NO_SAMPLES if index in auxiliary else samples[index] for index in range(start, end)]
    by_sample = tuple(entry for entry in found if entry is not None)
    if len(by_sample) < len(calls) or not _handed_on_by_sample(trace, list(outputs), samples, start, end):
        by_sample = ()
    kept = _kept_bytes(trace, start, end, crossing, element_bytes)
    entry = crossing.size(start) * element_bytes
    if kept < _MINIMUM_GAIN * entry:
        return None
    work = sum(work_of(trace, entry) for entry in calls)
    handed_on, needed_until = zip(*sorted(outputs.items()), strict=True)
    return Segment(
        start,
        end,
        handed_on,
        needed_until,
        by_sample,
        kept,
        entry,
        work,
        name=calls[0].container,
        auxiliary=auxiliary,
        joins=start not in trace.decisions,
    )


def _kept_bytes(trace: Trace, start: int, end: int, crossing: Crossing, element_bytes: int) -> int:
    """About what PyTorch's own operations in a segment keep, each memory once."""
    kept: set[int] = set()
    for entry in trace.calls[start:end]:
        if entry.call is None and name_of(entry.function) in PRODUCT_NAMES:
            carried = [v for v in entry.reads if crossing.carries[v]]
            kept |= {crossing.sources[v] for v in entry.reads if any(other != v for other in carried)}
            continue
        keeps = _keeps(entry)
        values = {*(entry.reads if keeps.inputs else ()), *(entry.makes if keeps.result else ())}
        kept |= {crossing.sources[v] for v in values}
    return sum(math.prod(trace.values[v].shape) for v in kept if trace.values[v].producer >= start) * element_bytes


def _keeps(entry: TracedCall) -> Keeps:
    """What the backward pass of a call keeps: as its kind declares, or by the name of a function that has none."""
    if entry.call is not None:
        return kind_of(entry.call).keeps(entry.call)
    name = name_of(entry.function)
    if name in BACKWARD_READS_NOTHING:
        return Keeps.NOTHING
    if name in BACKWARD_READS_RESULT:
        return Keeps.RESULT
    return Keeps.BOTH if name in BACKWARD_READS_BOTH else Keeps.INPUTS


#: The segments of a forward pass, in training and in evaluation mode.
Segments = ByMode[tuple[Segment, ...]]

NO_SEGMENTS: Segments = ByMode((), ())


def total_work(trace: Trace) -> int:
    """Multiply-adds of a forward pass."""
    return sum(work_of(trace, entry) for entry in trace.calls)


def work_of(trace: Trace, entry: TracedCall) -> int:
    """Multiply-adds of a call, of weight layers and matrix products; nothing else counts."""
    if isinstance(entry.call, WeightCall):
        return math.prod(entry.output_shape) // entry.call.output_channels * math.prod(entry.call.weight_shape)
    name = name_of(entry.function)
    if name == "scaled_dot_product_attention":
        return 2 * math.prod(entry.shapes[0]) * entry.shapes[1][-2]
    return math.prod(entry.output_shape) * entry.shapes[0][-1] if name in ("matmul", "bmm") and entry.shapes else 0


def _first_made(trace: Trace, value: int, start: int) -> tuple[int, int]:
    """The call that first returned the tensor of a value, and its place there: the model holds it since then."""
    same = trace.values[value].same_as
    while same is not None and trace.values[same].producer >= start:
        value, same = same, trace.values[same].same_as
    producer = trace.values[value].producer
    return (-1, 0) if same is not None else (producer, trace.calls[producer].makes.index(value))


def _handed_on_by_sample(
    trace: Trace, outputs: list[tuple[int, int]], samples: list[CallSamples | None], start: int, end: int
) -> bool:
    """Whether all that a segment hands on can be put together from chunks; a loss at its end is summed up."""
    for index, place in outputs:
        found = samples[index]
        if found is None:
            return False
        if found.outputs[place] is None and not (index == end - 1 and _sums(trace.calls[index])):
            return False
    losses = [i for i in range(start, end) if _sums(trace.calls[i])]
    return losses in ([], [end - 1])


def _sums(entry: TracedCall) -> bool:
    return entry.call is not None and kind_of(entry.call).sums_samples


def _writes_outside(trace: Trace, entry: TracedCall, start: int, sources: list[int]) -> bool:
    """Whether a call overwrites what was there before the segment: recomputed, it would be overwritten twice."""
    return any(value is None or _shows_older(trace, sources[value], start) for value in entry.written)


def _auxiliary_writes_what_is_read(calls: list[TracedCall], sources: list[int]) -> bool:
    """Whether ids or masks change after a call of the segment has read them: it is computed later than that."""
    read: set[int | None] = set()
    last = max(index for index, entry in enumerate(calls) if not entry.auxiliary)  # with it, the segment is computed
    for entry in calls[:last]:
        if not entry.auxiliary:
            read.update(sources[value] for value in entry.reads)
        elif any(value is None or sources[value] in read for value in entry.written):
            return True
    return False


def _shows_older(trace: Trace, value: int, start: int) -> bool:
    """Whether the memory of a value was there before the segment: made by an earlier call, or by none."""
    made = trace.values[value]
    producer = trace.calls[made.producer]
    older = made.producer < start or producer.auxiliary
    return older or (made.view and not isinstance(producer.call, WeightCall))
