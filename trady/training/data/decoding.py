"""Many image files as one array: decoded in parallel, all that cannot be read told at once, and kept for a resume."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from trady.errors import DataError
from trady.training.data.datasets import Pixels
from trady.training.data.image_files import UnreadableImageError, bombs_ignored, decode_square
from trady.training.data.kept_images import find_kept, keep_images
from trady.training.data.source import RawSplit, Reading

#: Decoded images that take more are kept in a temporary file instead of memory.
IN_MEMORY_BYTES = 2**30

#: Images that took longer to decode are kept in the run folder until the run is finished.
KEPT_SECONDS = 10.0

#: Threads that decode, at most; Pillow leaves Python to the others while it works.
_MOST_THREADS = 8

#: Pixels that are decoded at a time in all threads together, unless a single image has more: 100 MB with their copies.
_PIXELS_AT_ONCE = 2**24

#: Files that are handed to the threads at a time.
_AT_ONCE = 512

#: Unreadable files that a message names.
_NAMED = 20


@dataclass(frozen=True)
class Decoded:
    """A part of a data set.

    Attributes:
        split: Its images and labels.
        errors: Why a file could not be read, by its place among the files; only where these are skipped.
        labels: Of all files.
    """

    split: RawSplit
    errors: Mapping[int, str] = field(default_factory=dict)
    labels: tuple[int, ...] = ()

    def first_of(self, label: int) -> str:
        """Say why the first image of a class could not be read."""
        return next((said for at, said in sorted(self.errors.items()) if self.labels[at] == label), "it is gone")


def decode(files: list[tuple[Path, int]], reading: Reading, skipped: list[str], part: str, top: Path) -> Decoded:
    """Decode files, each once.

    Args:
        files: Paths and labels.
        reading: How.
        skipped: Files that cannot be read are appended, where they are to be skipped.
        part: Name of the part, under which it is kept.
        top: The data set.

    Raises:
        DataError: Files cannot be read; all of them are named.
        ResourceError: Disk or memory ran out.
    """
    labels = tuple(label for _, label in files)
    kept = find_kept(reading, part, files, top)
    if kept is not None:
        pixels, errors = kept
    else:
        pixels = _empty((len(files), reading.image_size, reading.image_size, 3))
        started = time.monotonic()
        errors = _decode_all(files, pixels, reading)
        if reading.keep is not None and time.monotonic() - started >= KEPT_SECONDS:
            keep_images(reading, part, files, top, pixels, errors)
    if errors and reading.on_unreadable == "refuse":
        raise DataError(_refusal(list(errors.values()), len(files)))
    skipped.extend(str(files[at][0]) for at in sorted(errors))
    whole = [at for at in range(len(files)) if at not in errors]
    if errors:
        for to, at in enumerate(whole):
            if to != at:
                pixels[to] = pixels[at]
    chosen = np.asarray(labels, dtype=np.int64)[whole] if whole else np.zeros(0, np.int64)
    return Decoded(RawSplit(pixels[: len(whole)], chosen), errors, labels)


def _decode_all(files: list[tuple[Path, int]], pixels: Pixels, reading: Reading) -> dict[int, str]:
    """Write every image into ``pixels``; return why some could not be read, by their place."""
    errors: dict[int, str] = {}
    room = _Room(_PIXELS_AT_ONCE)

    def one(at: int) -> None:
        try:
            pixels[at] = decode_square(files[at][0], reading.image_size, room)
        except UnreadableImageError as error:
            errors[at] = str(error)

    numbers, done = iter(range(len(files))), 0
    with bombs_ignored():
        pool = ThreadPoolExecutor(min(_MOST_THREADS, _processors(), max(1, len(files))), "trady-decode")
        try:
            while chunk := list(islice(numbers, _AT_ONCE)):
                for _ in pool.map(one, chunk):
                    done += 1
                    reading.progress(done, len(files))
        finally:  # also after Ctrl-C: what has not begun does not begin
            pool.shutdown(wait=True, cancel_futures=True)
    return dict(sorted(errors.items()))


def _refusal(errors: list[str], count: int) -> str:
    do = "mend or remove it, or skip such files with --on-unreadable skip"
    if len(errors) == 1:
        return f"{errors[0]}; {do}"
    named = "\n".join(f"  {error}" for error in errors[:_NAMED])
    more = f"\n  … and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
    return f"{len(errors)} of {count} images cannot be read; {do.replace('it,', 'them,')}\n{named}{more}"


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class _Room:
    """Room for pixels: threads wait until there is enough of it; an image that is larger than all of it goes alone."""

    def __init__(self, pixels: int) -> None:
        self._all = self._left = pixels
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self, pixels: int) -> Iterator[None]:
        wanted = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= wanted)
            self._left -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._left += wanted
                self._changed.notify_all()


def _empty(shape: tuple[int, ...]) -> Pixels:
    """Return an array for decoded images: in memory, or in an unnamed file if it is large."""
    if (size := math.prod(shape)) <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the content alive
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and would kill the process later
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
