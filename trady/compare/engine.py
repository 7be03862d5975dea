"""Where cells are run: the one interface that the local processes and Ray have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trady.compare.cell_folder import Outcome
from trady.compare.cells import Job


@dataclass(frozen=True)
class Ended:
    """A cell that is no longer running.

    Attributes:
        job: The cell.
        outcome: How it ended; ``None`` where its worker died under it.
        death: What the worker died of.
    """

    job: Job
    outcome: Outcome | None
    death: str = ""


class Engine(Protocol):
    """Workers that live on from cell to cell."""

    def free(self) -> int:
        """Return how many cells could be started now."""

    def start(self, job: Job) -> None:
        """Run a cell on a free worker."""

    def wait(self, timeout_seconds: float) -> list[Ended]:
        """Return the cells that ended, as soon as there is one; dead workers are replaced."""

    def close(self) -> None:
        """Stop all workers at once; what they were at can be resumed."""
