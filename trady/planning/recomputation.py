"""What is kept and what is recomputed: the least extra time with which a step stays inside its budget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from trady.analysis.segments import Segment, merged
from trady.simulation.simulator import SegmentsByMode
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

    segments: SegmentsByMode = field(default_factory=dict)
    found: int = 0
    joined: int = 1
    share_of_work: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Modules that the chosen segments begin in."""
        return tuple(segment.name for segment in self.segments.get(True, ()))


class Planner:
    """Chooses among the segments of one model.

    Args:
        found: All segments, in training and evaluation mode (:func:`trady.analysis.model_analysis.find_recomputable`).
        work: Multiply-adds of the forward pass.

    """

    def __init__(self, found: SegmentsByMode, work: int) -> None:
        self._found, self._work = found, work

    @property
    def has_choice(self) -> bool:
        """Whether there is anything that could be recomputed."""
        return bool(self._found.get(True))

    @property
    def nothing(self) -> Recomputation:
        """Keep everything."""
        return Recomputation(found=len(self._found.get(True, ())))

    @property
    def everything(self) -> Recomputation:
        """Recompute every segment."""
        return self._choose(list(self._found.get(True, ())), 1)

    def least_time(
        self, timeline_of: Callable[[Recomputation], Timeline], peak_of: Callable[[Timeline], int], most: int
    ) -> tuple[Recomputation, Timeline]:
        """Find the choice with the least extra time whose peak is at most ``most``; else that of the least peak.

        SegmentsByMode that free the most bytes for a multiply-add are taken first; when all are taken, neighbours
        are joined, so that fewer activations are kept.

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
        for joined in _JOINED:
            before, (choice, timeline) = best, self._joined(timeline_of, joined)
            if peak_of(timeline) >= peak_of(best[1]):
                break
            best = choice, timeline
            if peak_of(timeline) <= most:
                return self._fewer_joins(timeline_of, peak_of, most, before, best)
        return best

    def _joined(
        self, timeline_of: Callable[[Recomputation], Timeline], joined: int, most: int | None = None
    ) -> tuple[Recomputation, Timeline]:
        choice = self._choose(list(self._found[True]), joined, most)
        return choice, timeline_of(choice)

    def _fewer_joins(
        self,
        timeline_of: Callable[[Recomputation], Timeline],
        peak_of: Callable[[Timeline], int],
        most: int,
        before: tuple[Recomputation, Timeline],
        best: tuple[Recomputation, Timeline],
    ) -> tuple[Recomputation, Timeline]:
        """Join no more neighbours than needed; every join frees about as much as the next."""
        joined, whole = best[0].joined, len(self._found[True]) - len(best[0].segments[True])
        share = (peak_of(before[1]) - most) / max(peak_of(before[1]) - peak_of(best[1]), 1)
        for joins in sorted({math.ceil(share * whole), math.ceil((share + 1) / 2 * whole)}):
            found = self._joined(timeline_of, joined, joins)
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
        by_gain = sorted(self._found[True], key=lambda s: (s.kept_bytes - s.entry_bytes) / max(s.work, 1), reverse=True)
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
            {True: merged(ordered, joined, most), False: self._found.get(False, ())},
            len(self._found[True]),
            joined,
            sum(segment.work for segment in ordered) / max(self._work, 1),
        )
