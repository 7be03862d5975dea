"""Decoded images of a run, kept in its folder until it is finished: a run that is resumed does not decode again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trady.errors import DataError, TradyError
from trady.records.files import write_json, write_whole
from trady.records.reading import check_regular
from trady.records.versioned import Format
from trady.training.data.datasets import Pixels
from trady.training.data.source import Reading

_FORMAT = Format("trady-images", "record of decoded images", DataError, "remove it")

_Files = list[tuple[Path, int]]


@dataclass(frozen=True)
class _Kept:
    """What lies beside the pixels of a part.

    Attributes:
        files: Digest of the files that they were decoded from.
        shape: Of the pixels.
        errors: Why a file could not be read, by its place.
    """

    files: str
    shape: tuple[int, ...]
    errors: Mapping[str, str]


def find_kept(reading: Reading, part: str, files: _Files, top: Path) -> tuple[Pixels, dict[int, str]] | None:
    """Return the pixels of a part and what could not be read, if they were kept and the files are the same."""
    if reading.keep is None:
        return None
    record, pixels = _places(reading.keep, part)
    if not (record.is_file() and pixels.is_file()):
        return None
    shape = (len(files), reading.image_size, reading.image_size, 3)
    try:
        found = _FORMAT.load(record, lambda data: _FORMAT.read(_Kept, data))
        check_regular(pixels)
        if found.files != _digest(files, top) or found.shape != shape or pixels.stat().st_size != np.prod(shape):
            return None
        errors = {int(at): said for at, said in found.errors.items()}
        # Written to where files are skipped: in memory only.
        return np.memmap(pixels, dtype=np.uint8, mode="c", shape=shape), errors
    except (TradyError, OSError, ValueError):  # whatever is wrong with it, the images are there
        return None


def keep_images(
    reading: Reading, part: str, files: _Files, top: Path, pixels: Pixels, errors: Mapping[int, str]
) -> None:
    """Keep the pixels of a part; where that cannot be done, the next run decodes again."""
    if reading.keep is None:
        return
    record, place = _places(reading.keep, part)
    with suppress(TradyError, OSError):
        reading.keep.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        write_whole(place, lambda path: pixels.tofile(path))
        kept = _Kept(_digest(files, top), pixels.shape, {str(at): said for at, said in errors.items()})
        write_json(record, {**_FORMAT.header(), **asdict(kept)})


def _places(folder: Path, part: str) -> tuple[Path, Path]:
    return folder / f"{part}.json", folder / f"{part}.pixels"


def _digest(files: _Files, top: Path) -> str:
    """Name files by their paths, labels, sizes and times."""
    found = hashlib.sha256()
    for path, label in files:
        try:
            state = path.stat()
            facts = f"{state.st_size} {state.st_mtime_ns}"
        except OSError:  # a link to nowhere
            facts = "-"
        found.update(f"{path.relative_to(top)}\0{label} {facts}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()
