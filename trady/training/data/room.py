"""Whether there is memory for what is to be read, asked before it is taken."""

from __future__ import annotations

import errno

from trady.errors import ResourceError
from trady.process.free import memory_left
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
