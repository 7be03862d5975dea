"""Files as bytes: regular ones, up to a size. A pipe or a device would keep a reader waiting, or never end."""

from __future__ import annotations

import errno
import hashlib
import os
import stat

#: The largest JSON, JSON lines or TOML file that is read; a plan of the largest models takes a few MiB.
MOST_TEXT_BYTES = 128 << 20

_KINDS = (
    (stat.S_ISDIR, "it is a folder, not a file"),
    (stat.S_ISFIFO, "it is a pipe, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
    (stat.S_ISCHR, "it is a device, not a file"),
    (stat.S_ISBLK, "it is a device, not a file"),
)


def other_kind(mode: int) -> str | None:
    """Say what something is, if it is no regular file; ``mode`` is ``st_mode``."""
    if stat.S_ISREG(mode):
        return None
    return next((text for is_one, text in _KINDS if is_one(mode)), "it is no regular file")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is no regular file, without opening it.

    Raises:
        OSError: It is not there, or is something else.
        ValueError: The path cannot be one.
    """
    if (kind := other_kind(os.stat(path).st_mode)) is not None:  # noqa: PTH116 - any path-like
        raise OSError(errno.EINVAL, kind)


def read_bytes(path: str | os.PathLike[str], most: int | None = MOST_TEXT_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        most: Its largest size; ``None`` is any.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
        ValueError: The path cannot be one.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        state = os.fstat(descriptor)
        if (kind := other_kind(state.st_mode)) is not None:
            raise OSError(errno.EINVAL, kind)
        if most is not None and state.st_size > most:
            raise OSError(errno.EFBIG, f"it has {state.st_size} bytes, and no such file has more than {most}")
        return file.read() if most is None else file.read(most + 1)


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits; the file may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # noqa: PTH123 - any path-like
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
