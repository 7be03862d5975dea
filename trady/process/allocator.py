"""What the C library's allocator does with freed memory: glibc keeps it, unless it is told to give it back.

By itself, glibc raises the size from which a block is mapped on its own to that of the largest block that was freed,
up to 32 MiB. From then on the tensors of a step come from one heap, where freed blocks stay resident between live ones.
With a fixed threshold, a tensor of that size goes back to the kernel when it is freed. What that saves, and the time
that it costs, is measured by ``python -m benchmarks.process`` (docs/budgets.md).
"""

from __future__ import annotations

import ctypes
import os

#: Blocks of that many bytes are mapped on their own, and as many free ones at the top of the heap are given back.
THRESHOLD_BYTES = 128 << 10

#: Options of ``mallopt``, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def is_glibc() -> bool:
    """Whether this process allocates with glibc."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


def return_freed_memory(threshold_bytes: int = THRESHOLD_BYTES) -> bool:
    """Let freed tensors go back to the kernel; for the rest of the process.

    Args:
        threshold_bytes: From this size on.

    Returns:
        Whether the allocator does: it is glibc's, and took the settings.
    """
    if not is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, threshold_bytes) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def trim() -> None:
    """Give back what is free in the heap now, at its top and in between."""
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)
