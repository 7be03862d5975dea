"""Resident memory of this process: what the kernel has given it pages for.

Counted is all of it, as ``ps`` and ``top`` show it (``VmRSS``): anonymous pages, shared ones, and pages of files that
are mapped, such as the code of PyTorch. The kernel can take clean pages of files back without killing anybody. They
count all the same: a board that reads PyTorch's code from its card at every step does not train.
"""

from __future__ import annotations

import mmap
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

_STATUS, _REFERENCES, _PAGES = (Path("/proc/self") / name for name in ("status", "clear_refs", "pagemap"))

#: Of an entry of ``pagemap``, eight bytes a page: the page is in memory.
_PRESENT = 1 << 63

_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)

#: Tells the kernel to count the peak from here on.
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Resident:
    """Memory of this process at one time.

    Attributes:
        resident_bytes: Resident now.
        peak_bytes: The most that was, since the process began or :func:`reset_peak`.
        anonymous_bytes: The part of ``resident_bytes`` that no file backs, which the kernel cannot take back.
    """

    resident_bytes: int
    peak_bytes: int
    anonymous_bytes: int


def resident() -> Resident | None:
    """Read it; ``None`` where the system does not tell (it does on Linux)."""
    try:
        found = {name: int(kib) << 10 for name, kib in _LINE.findall(_STATUS.read_text())}
        return Resident(found["VmRSS"], found["VmHWM"], found["RssAnon"])
    except (OSError, KeyError):
        return None


def reset_peak() -> bool:
    """Count the peak from here on; return whether the kernel does."""
    try:
        _REFERENCES.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def resident_bytes_of(address: int, size: int) -> int:
    """Return how many bytes of a block are in memory: pages that were never written to, or read from a file, are not.

    Where the system does not tell, all of them.

    Args:
        address: Where the block begins.
        size: Its bytes.
    """
    if size == 0:
        return 0
    first, last = address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE
    try:
        with _PAGES.open("rb", buffering=0) as file:
            file.seek(8 * first)
            pages = array("Q", file.read(8 * (last - first + 1)))
    except (OSError, ValueError, OverflowError):
        return size
    return min(size, mmap.PAGESIZE * sum(1 for page in pages if page & _PRESENT))
