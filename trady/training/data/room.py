"""Whether there is memory for what is to be read, asked before it is taken."""

from __future__ import annotations

import errno
from pathlib import Path

from trady.errors import ResourceError
from trady.report.units import format_bytes


def check_room(needed: int, what: str) -> None:
    """Refuse to read what is larger than the memory that is left.

    Args:
        needed: Bytes that it takes.
        what: What takes them, for people.

    Raises:
        ResourceError: There is less.
    """
    left = memory_left()
    if left is not None and needed > left:
        error = ResourceError(
            f"{what} take {format_bytes(needed)} of memory, and {format_bytes(left)} are left; nothing was read: end "
            "other programs, or keep fewer or smaller images"
        )
        error.errno = errno.ENOMEM
        raise error


def memory_left() -> int | None:
    """Return how many bytes this process could still take: of the machine's, its group's and its own limit."""
    found = [left for left in (_of_machine(), _of_group(), _of_process()) if left is not None]
    return max(0, min(found)) if found else None


def _of_machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _of_group() -> int | None:
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    return int(limit[0]) - int(used[0]) if limit and used and limit[0].isdecimal() else None


def _of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = _lines("/proc/self/statm")
    return limit - int(used[0].split()[0]) * resource.getpagesize() if used else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
