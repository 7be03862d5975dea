"""What other libraries raise about a person's files, disk and memory, as one sentence of ours."""

from __future__ import annotations

import errno
import gzip
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from trady.errors import FileError, ResourceError, TradyError

_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

_LIMITS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}

#: How PyTorch's allocators begin or end what they say when memory ran out.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")

#: Errors that only a damaged or foreign file causes.
_DAMAGE = (EOFError, UnicodeError, RecursionError, gzip.BadGzipFile, struct.error, zipfile.BadZipFile, zlib.error)


def at(error: BaseException, path: str | os.PathLike[str]) -> BaseException:
    """Return the system's error in an error of writing ``path``, with that name in the place of a temporary one."""
    number = error.errno if isinstance(error, OSError) else None
    if (said := re.search(r"\(os error (\d+)\)", str(error))) is not None:  # how safetensors says it
        number = int(said[1])
    return error if number is None else OSError(number, os.strerror(number), os.fspath(path))


def in_our_words(error: BaseException) -> TradyError | None:
    """Return an error of trady's that says what happened, what is safe and what to do.

    Args:
        error: Anything that was raised.

    Returns:
        ``error`` itself where it is one of ours; ``None`` where it is no matter of files, disk or memory.
    """
    if isinstance(error, TradyError):
        return error
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    ):
        said = str(error).partition("\n")[0]
        return _lack(errno.ENOMEM, f"memory ran out{f' ({said[:200]})' if said else ''}", _LESS_MEMORY)
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError):
        return _of_system(error)
    if type(error).__name__ == "SafetensorError" and isinstance(system := at(error, ""), OSError):
        return _of_system(system)
    if isinstance(error, _DAMAGE) or type(error).__name__ in ("JSONDecodeError", "SafetensorError"):
        return FileError(
            f"a file is damaged, or is not what its name says ({type(error).__name__}: {_line(error)}); nothing was "
            "changed: --debug shows which file; write it again, or name another"
        )
    return None


@contextmanager
def file_errors() -> Iterator[None]:
    """Raise what goes wrong with files, disk and memory in our words."""
    try:
        yield
    except Exception as error:
        told = in_our_words(error)
        if told is None or told is error:
            raise
        raise told from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what goes wrong while ``path`` is written in our words, with its name in the place of a temporary one.

    Raises:
        ResourceError: The disk is full.
        FileError: It cannot be written there.
    """
    try:
        yield
    except TradyError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        told = in_our_words(at(error, path))
        if told is None:
            raise
        raise told from error


_LESS_MEMORY = "lower --batch-size, --micro-batch or --budget, or end other programs; a run goes on with --resume"

_LESS_DISK = "make room, or write to another disk (--out); a run goes on with --resume"


def _of_system(error: OSError) -> TradyError:
    place = f"{error.filename}: " if error.filename else ""
    said = error.strerror or _line(error) or type(error).__name__
    if error.errno in _DISK:
        return _lack(error.errno, f"{place}the disk is full ({said})", _LESS_DISK)
    if error.errno in _LIMITS:
        return _lack(error.errno, f"{place}{said}", _LESS_MEMORY)
    found = FileError(f"{place}{said}; nothing there was changed: give a file or folder that can be read and written")
    found.errno = error.errno
    return found


def _lack(number: int | None, what: str, remedy: str) -> ResourceError:
    found = ResourceError(f"{what}; complete files and the last checkpoint are as they were: {remedy}")
    found.errno = number
    return found


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
