"""One process at a time in a folder: a lock that the system frees when its process ends, however it ends.

``flock`` is taken where there is one. Elsewhere (Windows, some network file systems) the lock is a file that exists:
the one of a process that is gone from this machine is taken over, that of another machine is removed by hand.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType

from trady.errors import LockedError, StateError, TradyError
from trady.records.processes import is_running
from trady.records.translated import writing
from trady.records.versioned import Format

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None

#: The file in a folder that is locked; it says who holds the lock.
LOCK = ".lock"

_RECORD = Format(None, "lock", StateError, "remove it, if nobody works there")

#: What systems and file systems without locks answer.
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_POLL_SECONDS = 0.1

#: How long whoever has taken a lock is given to write who they are.
_WRITING_SECONDS = 0.5

#: Descriptors of the locks that this process holds.
_held: set[int] = set()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        pid: Number of the process.
        host: Its machine.
        since: When it took the lock, local time in ISO 8601.
    """

    pid: int
    host: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        """Return this process, as of now."""
        return cls(os.getpid(), platform.node(), datetime.now().astimezone().isoformat(timespec="seconds"))

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Return who has written a lock; ``None`` if nobody can be read from it, as in the instant of its writing."""
        try:
            return _RECORD.read(cls, _RECORD.read_json(path))
        except TradyError:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def locked(folder: Path, *, name: str = LOCK, patience_seconds: float = 0.0) -> Iterator[None]:
    """Keep other processes, and other threads that ask, out of a folder.

    The folder is made, and removed again if nothing was written into it. What a killed process has left of its lock
    does not count.

    Args:
        folder: The folder.
        name: Name of the lock's file in it.
        patience_seconds: How long to wait for one who is leaving.

    Raises:
        LockedError: Somebody else works there; it says who, where and since when.
        ResourceError: The disk is full.
        FileError: The folder cannot be made, or nothing can be written there.
    """
    made = not folder.exists()
    place = folder / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _wait_for(place, patience_seconds)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # a forked child that gets here has no lock to give back
            _held.discard(descriptor)
            if fcntl is None:  # Windows removes no file that is open
                os.close(descriptor)
            place.unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
            if fcntl is not None:
                os.close(descriptor)
        if made:
            with suppress(OSError):
                folder.rmdir()


def refuse_locked(folder: Path, *, name: str = LOCK) -> None:
    """Say early what :func:`locked` would say; take nothing and change nothing.

    Raises:
        LockedError: Somebody else works there.
    """
    if (folder / name).exists():
        with locked(folder, name=name):
            pass


def _wait_for(place: Path, patience_seconds: float) -> int:
    """Return the open lock, as soon as nobody else has it."""
    until = time.monotonic() + patience_seconds
    while (descriptor := _take(place)) is None:
        if time.monotonic() >= until:
            holder = _holder(place)
            raise LockedError(
                f"{place.parent} is in use by {holder or 'another process'}: wait until it is done, stop it, or name "
                f"another folder{_by_hand(place, holder)}"
            )
        time.sleep(min(_POLL_SECONDS, patience_seconds))
    return descriptor


def _holder(place: Path) -> Holder | None:
    """Return who has the lock; one who has just taken it is given the moment that writing a name takes."""
    until = time.monotonic() + _WRITING_SECONDS
    while (holder := Holder.read(place)) is None and time.monotonic() < until:
        time.sleep(_WRITING_SECONDS / 50)
    return holder


def _take(place: Path) -> int | None:
    """Return the open lock, or ``None`` if somebody else has it."""
    if fcntl is None:
        return _take_by_record(place)
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, its holder may have ended and removed it.
        if not _is_at(descriptor, place):
            os.close(descriptor)
            return _take(place)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        if error.errno not in _WITHOUT_LOCKS:
            raise
        if _is_empty(place):
            place.unlink(missing_ok=True)
        return _take_by_record(place)
    _write(descriptor)
    return descriptor


def _take_by_record(place: Path) -> int | None:
    holder = Holder.read(place)
    if holder is not None and holder.host == platform.node() and not is_running(holder.pid):
        _remove_stale(place, holder)
    try:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    _write(descriptor)
    return descriptor


def _remove_stale(place: Path, holder: Holder) -> None:
    """Remove the lock of a process that is gone, unless somebody else has done so and taken it meanwhile."""
    aside = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        place.rename(aside)
        if Holder.read(aside) != holder:
            os.link(aside, place)
        aside.unlink()


def _write(descriptor: int) -> None:
    with suppress(OSError):  # on a full disk it is locked, and only does not say by whom
        os.ftruncate(descriptor, 0)
        os.write(descriptor, (json.dumps(asdict(Holder.me())) + "\n").encode())


def _is_at(descriptor: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


def _is_empty(place: Path) -> bool:
    try:
        return place.stat().st_size == 0
    except OSError:
        return False


def _by_hand(place: Path, holder: Holder | None) -> str:
    if holder is not None and holder.host == platform.node():
        return ""
    return f"; if nobody works there any more, remove {place}"


def _forget_in_child() -> None:
    """Let a lock end with the process that took it, whatever children it has forked (readers of data)."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
