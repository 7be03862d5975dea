"""A cell on disk: its identity, its status, and a lock so that one process at a time works in it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from trady.compare.cells import Cell
from trady.errors import LockedError, StateError
from trady.records import schema
from trady.records.files import remove_temporaries, write_json
from trady.records.lock import locked
from trady.records.reading import read_bytes
from trady.records.versioned import Format
from trady.training.run_folder import RunFolder

CELL = Format(None, "record of a cell", StateError, "remove the cell's folder, and run it again")

#: The file that is locked while a cell runs.
CELL_LOCK = ".cell.lock"

T = TypeVar("T")


class Status(str, Enum):
    """The status of a cell."""

    DONE = "done"
    INFEASIBLE = "infeasible"
    FAILED = "failed"
    STARTED = "started"
    MISSING = "missing"
    BUSY = "busy"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        status: ``done``, ``infeasible``, ``failed`` or ``busy``.
        message: Why, where it is not done.
        seconds: What training took.
    """

    status: Status
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """What ``error.json`` holds.

    Attributes:
        status: ``infeasible`` or ``failed``.
        message: Why.
    """

    status: Status
    message: str | None = None


@dataclass(frozen=True)
class _Identity:
    """Of ``cell.json``, what tells one cell from another, and what stays of it."""

    digest: str
    keep: str = ""


@dataclass(frozen=True)
class CellFolder:
    """The folder of one cell: a run folder with ``cell.json`` and, where it went wrong, ``error.json``."""

    path: Path
    cell: Cell

    @property
    def run(self) -> RunFolder:
        """The same folder, as ``trady.finetune`` knows it."""
        return RunFolder(self.path)

    @property
    def error(self) -> Path:
        """What went wrong."""
        return self.path / "error.json"

    def status(self) -> Status:
        """Return the status of the cell."""
        if not self._is_mine():
            return Status.MISSING
        if self.run.result.exists():
            return Status.DONE
        with contextlib.suppress(StateError):  # a damaged note is none: the cell is run again
            if self.error.exists():
                return self.failure().status
        return Status.STARTED

    def failure(self) -> Failure:
        """Return why the cell has no result.

        Raises:
            StateError: The file is damaged.
        """
        return self.load(Failure, self.error)

    @property
    def identity(self) -> Path:
        """Which cell it is, and what it runs on."""
        return self.path / "cell.json"

    def begin(self, machine: Mapping[str, Any], *, keep: str = "weights") -> None:
        """Write which cell this is, what it runs on and what stays of it, and remove an earlier error."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.error.unlink(missing_ok=True)
        write_json(
            self.identity, {**asdict(self.cell), "digest": self.cell.digest, "machine": dict(machine), "keep": keep}
        )

    def write_error(self, status: Status, error: BaseException | str) -> Outcome:
        """Record why the cell could not be run."""
        text = error if isinstance(error, str) else str(error) or type(error).__name__
        trace = "" if isinstance(error, str) else "".join(traceback.format_exception(error))
        kind = "" if isinstance(error, str) else type(error).__name__
        if not self._is_mine():
            self.begin({})
        write_json(self.error, {"status": str(status), "type": kind, "message": text, "traceback": trace})
        return Outcome(status, text)

    def clear_up(self) -> None:
        """End what a worker was killed in: a finished cell that was to keep its results alone drops its weights."""
        left = (self.path / CELL_LOCK, self.run.checkpoint, *self.run.weights)
        if self.status() is not Status.DONE or not any(path.exists() for path in left):
            return
        if self.load(_Identity, self.identity).keep == "results":
            with self.alone(0.0) as alone:
                if alone:
                    self.drop_weights()

    def drop_weights(self) -> None:
        """Remove weights and checkpoints, which the tables do not need."""
        self.run.drop_weights()

    def epochs_done(self) -> int:
        """Return how many epochs the metrics have."""
        with contextlib.suppress(OSError):
            return read_bytes(self.run.metrics).count(b"\n")
        return 0

    def load(self, kind: type[T], path: Path) -> T:
        """Return what a JSON file of the cell holds; where there is none, its defaults.

        Raises:
            StateError: It is damaged.
        """
        data = CELL.read_json(path) if path.exists() else {}
        with CELL.named(path), CELL.reading():
            return schema.read(kind, data)

    @contextlib.contextmanager
    def alone(self, patience_seconds: float) -> Iterator[bool]:
        """Lock the folder against other processes that run cells; yield whether that worked.

        The run in it has a lock of its own, against those who train in the folder without a comparison.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path, name=CELL_LOCK, patience_seconds=patience_seconds))
            except LockedError:
                yield False
                return
            remove_temporaries(self.path, alone=True)
            yield True

    def _is_mine(self) -> bool:
        try:
            return self.load(_Identity, self.identity).digest == self.cell.digest
        except StateError:
            return False
