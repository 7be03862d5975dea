"""What is kept and what is recomputed: the least extra time with which a step stays inside its budget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from trady.analysis.segments import NO_SEGMENTS, Segment, Segments, merged
from trady.model.mode import ByMode
from trady.simulation.timeline import Timeline

#: How ``recompute`` may be given to :func:`trady.prepare`.
MODES = ("auto", "all", "none")

#: How many neighbouring segments are joined, in turn, when recomputing all of them is not enough.
_JOINED = (2, 4, 8, 16)


@dataclass(frozen=True)
class Recomputation:
    """Which segments of the forward pass are recomputed in the backward pass.

    Attributes:
        segments: Those of the training and the evaluation pass.
        found: How many there are to choose from, in a training pass.
        joined: Neighbours that were joined into one.
        share_of_work: Multiply-adds that are executed a second time, over those of the forward pass, at most.
    """

    segments: Segments = NO_SEGMENTS
    found: int = 0
    joined: int = 1
    share_of_work: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Modules that the chosen segments begin in."""
        return tuple(segment.name for segment in self.segments.training)


class Planner:
    """Chooses among the segments of one model.

    Args:
        found: All segments, in training and evaluation mode (:func:`trady.analysis.model_analysis.find_recomputable`).
        work: Multiply-adds of the forward pass.

    """

    def __init__(self, found: Segments, work: int) -> None:
        self._found, self._work = found, work

    @property
    def has_choice(self) -> bool:
        """Whether there is anything that could be recomputed."""
        return bool(self._found.training)

    @property
    def nothing(self) -> Recomputation:
        """Keep everything."""
        return Recomputation(found=len(self._found.training))

    @property
    def everything(self) -> Recomputation:
        """Recompute every segment."""
        return self._choose(list(self._found.training), 1)

    def least_time(
        self, timeline_of: Callable[[Recomputation], Timeline], peak_of: Callable[[Timeline], int], most: int
    ) -> tuple[Recomputation, Timeline]:
        """Find the choice with the least extra time whose peak is at most ``most``; else that of the least peak.

        Segments that free the most bytes for a multiply-add are taken first. Where all of them are not enough, the last
        one is kept if that helps, and neighbours are joined, so that fewer activations are kept.

        Args:
            timeline_of: Simulates a step.
            peak_of: The peak in bytes, of the channels that are to fit.
            most: The budget in bytes.

        """
        kept = timeline_of(self.nothing)
        if peak_of(kept) <= most or not self.has_choice:
            return self.nothing, kept
        everything = timeline_of(self.everything)
        best = self.everything, everything
        if peak_of(everything) <= most:
            return self._fewest(timeline_of, peak_of, most, kept, best)
        # What the backward pass comes to first is needed at once: recomputing it may free nothing.
        segments = list(self._found.training)
        if len(segments) > 1:
            choice = self._choose(segments[:-1], 1)
            if peak_of(lighter := timeline_of(choice)) < peak_of(best[1]):
                best, segments = (choice, lighter), segments[:-1]
        for joined in _JOINED:
            if peak_of(best[1]) <= most:
                return best
            before, (choice, timeline) = best, self._joined(timeline_of, segments, joined)
            if peak_of(timeline) >= peak_of(best[1]):
                break
            best = choice, timeline
            if peak_of(timeline) <= most:
                return self._fewer_joins(timeline_of, peak_of, most, segments, before, best)
        # With few samples, what is read again may take more than what is kept.
        return (self.nothing, kept) if peak_of(kept) < peak_of(best[1]) else best

    def _joined(
        self,
        timeline_of: Callable[[Recomputation], Timeline],
        segments: list[Segment],
        joined: int,
        most: int | None = None,
    ) -> tuple[Recomputation, Timeline]:
        choice = self._choose(segments, joined, most)
        return choice, timeline_of(choice)

    def _fewer_joins(
        self,
        timeline_of: Callable[[Recomputation], Timeline],
        peak_of: Callable[[Timeline], int],
        most: int,
        segments: list[Segment],
        before: tuple[Recomputation, Timeline],
        best: tuple[Recomputation, Timeline],
    ) -> tuple[Recomputation, Timeline]:
        """Join no more neighbours than needed; every join frees about as much as the next."""
        joined, whole = best[0].joined, len(segments) - len(best[0].segments.training)
        share = (peak_of(before[1]) - most) / max(peak_of(before[1]) - peak_of(best[1]), 1)
        for joins in sorted({math.ceil(share * whole), math.ceil((share + 1) / 2 * whole)}):
            found = self._joined(timeline_of, segments, joined, joins)
            if peak_of(found[1]) <= most:
                return found
        return best

    def _fewest(
        self,
        timeline_of: Callable[[Recomputation], Timeline],
        peak_of: Callable[[Timeline], int],
        most: int,
        kept: Timeline,
        best: tuple[Recomputation, Timeline],
    ) -> tuple[Recomputation, Timeline]:
        """The peak falls about evenly with the bytes that need not be kept: a few simulations find the place."""
        by_gain = sorted(
            self._found.training, key=lambda s: (s.kept_bytes - s.entry_bytes) / max(s.work, 1), reverse=True
        )
        freed = [0, *accumulate(max(segment.kept_bytes - segment.entry_bytes, 1) for segment in by_gain)]
        low, high = 0, len(by_gain)
        peaks = {low: peak_of(kept), high: peak_of(best[1])}
        tried = 0
        while high - low > 1:
            share = (peaks[low] - most) / max(peaks[low] - peaks[high], 1)
            expected = bisect_left(freed, freed[low] + share * (freed[high] - freed[low]))
            # Every third time in the middle: so it ends soon where the peak does not fall evenly.
            middle = (low + high) // 2 if tried % 3 == 2 else min(max(expected, low + 1), high - 1)
            tried += 1
            choice = self._choose(by_gain[:middle], 1)
            timeline = timeline_of(choice)
            peaks[middle] = peak_of(timeline)
            if peaks[middle] <= most:
                high, best = middle, (choice, timeline)
            else:
                low = middle
        return best

    def _choose(self, taken: list[Segment], joined: int, most: int | None = None) -> Recomputation:
        ordered = tuple(sorted(taken, key=lambda segment: segment.start))
        if not ordered:
            return self.nothing
        return Recomputation(
            ByMode(merged(ordered, joined, most), self._found.evaluation),
            len(self._found.training),
            joined,
            sum(segment.work for segment in ordered) / max(self._work, 1),
        )
