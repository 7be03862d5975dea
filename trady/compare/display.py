"""The progress of a matrix: a live line on a terminal, a line for each cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trady.compare.cell_folder import Outcome
from trady.compare.cells import Job


class Display:
    """Shows the cells done, left and running, and an estimate of the time left.

    Args:
        console: Standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = 0
        self.left = 0
        self._ended = 0
        self._started = 0.0
        self._live: Live | None = None

    def begin(self, total: int, left: int) -> None:
        """Report how many cells there are, and how many are to be run."""
        self.total, self.left, self._started = total, left, time.monotonic()
        self.say(f"{total} cells, {total - left} settled, {left} to run")
        if self.console.is_terminal and left:
            self._live = Live(Text(""), console=self.console, transient=True, refresh_per_second=2)
            self._live.start()

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Report how a cell ended."""
        self.left -= 1
        self._ended += 1
        said = outcome.message.splitlines()[0] if outcome.message else f"{outcome.seconds:.0f} s"
        count = f"[{self.total - self.left}/{self.total}]"
        self.say(f"{count} {job.cell.title}: {outcome.status}, {said}{self._time_left()}")

    def update(self, running: Sequence[tuple[Job, int]]) -> None:
        """Report which cells run, and how many epochs each has done."""
        if self._live is not None:
            cells = "; ".join(f"{job.cell.title} ({epochs}/{job.cell.settings['epochs']})" for job, epochs in running)
            self._live.update(
                Text(f"{self.total - self.left} of {self.total} cells done{self._time_left()}. Now {cells}")
            )

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Clear the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _time_left(self) -> str:
        if not self._ended or not self.left:
            return ""
        seconds = (time.monotonic() - self._started) / self._ended * self.left
        return f"; about {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"
