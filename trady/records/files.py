"""Files that are complete or absent: written under a temporary name, flushed, then renamed.

A temporary name says which process of which machine writes under it, so that what a killed one has left can be told
from what another one is writing.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trady.errors import FileError
from trady.records.processes import is_running
from trady.records.reading import other_kind
from trady.records.tensors import write_safetensors
from trady.records.translated import writing

_TEMPORARY = re.compile(r"^(\.|checkpoint\.).*tmp-(?:(?P<host>.+)-)?(?P<pid>\d+)$")


def temporary_name(path: Path) -> Path:
    """Return where this process writes what will be renamed to ``path``; it is hidden."""
    return path.with_name(f".{path.name.lstrip('.')}.tmp-{platform.node()}-{os.getpid()}")


def remove_temporaries(folder: Path, *, alone: bool) -> None:
    """Remove what processes that were killed have left of their writing in a folder.

    Args:
        folder: The folder; those inside of it are not looked into.
        alone: Whether nobody else writes there (:func:`trady.records.lock.locked`). Otherwise only what a process of
            this machine has left is removed, once that is gone.
    """
    _remove_leftovers(folder, "*.tmp-*", alone=alone)


def _remove_leftovers(folder: Path, pattern: str, *, alone: bool) -> None:
    for path in folder.glob(pattern) if folder.is_dir() else ():
        found = _TEMPORARY.match(path.name)
        if found is None:
            continue
        gone = found["host"] == platform.node() and not is_running(int(found["pid"]))
        if alone or gone:
            _remove(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there; a kill leaves it whole, or hidden for :func:`remove_temporaries`."""
    doomed = temporary_name(folder)
    _remove(doomed)
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then rename it to ``path``.

    What a killed process has left of writing the same file is removed.

    Raises:
        ResourceError: The disk is full; the file is as it was before.
        FileError: It cannot be written there, or a folder, a device or a pipe is there, which would be replaced.
    """
    if path.exists() and (kind := other_kind(path.stat().st_mode)) is not None:
        raise FileError(f"{path}: {kind}; nothing was written: name a file")
    temporary = temporary_name(path)
    _remove_leftovers(path.parent, f"{glob.escape(temporary.name.partition('.tmp-')[0])}.tmp-*", alone=False)
    try:
        with writing(path):
            write(temporary)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and machines; numbers survive the round trip exactly."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda place: _write_text(place, text))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file by these lines."""
    text = "".join(f"{line}\n" for line in lines)
    write_whole(path, lambda place: _write_text(place, text))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by this content."""

    def write(place: Path) -> None:
        place.write_bytes(content)

    write_whole(path, write)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, tensor by tensor."""
    write_whole(path, lambda place: write_safetensors(place, tensors, metadata))


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, outlive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # folders cannot be opened on every system
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems: folders, and nothing else
            raise
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, and flush it: all of it or, where the disk is full, nothing.

    Raises:
        ResourceError: The disk is full; the file is as it was.
        FileError: It cannot be written there.
    """
    with writing(path):
        _append(path, f"{line}\n".encode())


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            while content:  # a disk that is nearly full takes a part without an error
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
