"""Where cells are run: the common interface of local processes and Ray."""

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
        outcome: How it ended; ``None`` if its worker died.
        death: Why the worker died.
    """

    job: Job
    outcome: Outcome | None
    death: str = ""


class Engine(Protocol):
    """Workers that run one cell after another."""

    def free(self) -> int:
        """Return how many cells could be started now."""

    def start(self, job: Job) -> None:
        """Run a cell on a free worker."""

    def wait(self, timeout_seconds: float) -> list[Ended]:
        """Return the cells that ended, as soon as there is one; dead workers are replaced."""

    def close(self) -> None:
        """Stop all workers at once; their cells can be resumed."""
