"""Starts the cells that are left, until all are done or the time is up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trady.compare.cell_folder import Status
from trady.compare.cells import Job
from trady.compare.display import Display
from trady.compare.engine import Ended, Engine
from trady.compare.execute import Workplace

#: How often a cell whose worker died is resumed.
RESUMES = 1
_POLL_SECONDS = 1.0


@dataclass
class Drive:
    """One call of ``trady compare``.

    Attributes:
        place: Where the folders are.
        engine: Runs cells.
        display: Shows every cell.
        max_minutes: No cell starts after this time, and running cells are stopped, to be resumed later.
    """

    place: Workplace
    engine: Engine
    display: Display
    max_minutes: float | None = None
    _deaths: Counter[str] = field(default_factory=Counter, init=False)
    _running: list[Job] = field(default_factory=list, init=False)

    def run(self, jobs: Sequence[Job], total: int) -> bool:
        """Run these cells, out of ``total``; return whether all were reached before the time was up."""
        until = None if self.max_minutes is None else time.monotonic() + 60 * self.max_minutes
        left = list(reversed(jobs))
        self.display.begin(total, len(left))
        try:
            while left or self._running:
                remaining = None if until is None else until - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                while left and self.engine.free() > 0:
                    self._start(left.pop())
                for ended in self.engine.wait(min(_POLL_SECONDS, remaining or _POLL_SECONDS)):
                    left += self._end(ended)
                self.display.update([(job, self.place.cell_folder(job).epochs_done()) for job in self._running])
            return True
        finally:
            self.engine.close()
            self.display.close()

    def _start(self, job: Job) -> None:
        self._running.append(job)
        self.engine.start(job)

    def _end(self, ended: Ended) -> list[Job]:
        """Record how a cell ended; return it if it is to be resumed."""
        self._running.remove(ended.job)
        if ended.outcome is not None:
            self.display.ended(ended.job, ended.outcome)
            return []
        self._deaths[ended.job.cell.folder] += 1
        if self._deaths[ended.job.cell.folder] <= RESUMES:
            self.display.say(f"{ended.job.cell.title}: {ended.death}; resuming it")
            return [ended.job]
        folder = self.place.cell_folder(ended.job)
        self.display.ended(ended.job, folder.write_error(Status.FAILED, f"{ended.death}, and again when resumed"))
        return []


def jobs_left(jobs: Sequence[Job], place: Workplace, done: set[str], *, retry_failed: bool) -> list[Job]:
    """Return the cells that are to be run.

    Args:
        jobs: All cells.
        place: Where their folders are.
        done: Digests of cells that are known from the results alone, their folders being gone.
        retry_failed: Whether those that failed or were infeasible get another chance.
    """
    settled = {Status.DONE} if retry_failed else {Status.DONE, Status.FAILED, Status.INFEASIBLE}
    return [job for job in jobs if job.cell.digest not in done and place.cell_folder(job).status() not in settled]
