"""One process that reads damaged files, one after the other, and tells what became of each."""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.fuzz.mutations import mutated
from benchmarks.fuzz.readers import READERS, Reader
from trady.errors import ResourceError, TradyError

#: What a reader may take: seconds, and bytes beyond those that the process has.
MOST_SECONDS, MOST_BYTES = 5, 1 << 30


class HangError(BaseException):
    """The time is up; no reader catches it."""


def work(folder: Path, names: tuple[str, ...], seed: int, first: int, last: int, progress: Path) -> None:
    """Read the files from ``first`` up to ``last``; print a line of JSON for every fault, and the counts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    readers = [reader for reader in READERS if reader.name in names]
    for reader in readers:
        _pristine(folder, reader)
        reader.read(_pristine(folder, reader))  # imports, and caches, before memory is limited
    signal.signal(signal.SIGALRM, _too_long)
    limit = _address_space() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[str] = Counter()
    parent = os.getppid()
    with progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as here:
        for number in range(first, last):
            here[:8] = struct.pack("<q", number)
            reader = readers[number % len(readers)]
            outcome, fault = one(folder, reader, seed, number)
            counts[f"{reader.name} {outcome}"] += 1
            if fault is not None:
                print(json.dumps({"number": number, "reader": reader.name, "outcome": outcome, **fault}), flush=True)
            if number % 200 == 199:
                if os.getppid() != parent:  # nobody listens any more
                    return
                print(json.dumps({"counts": counts}), flush=True)
                counts.clear()
        here[:8] = struct.pack("<q", last)
    print(json.dumps({"counts": counts}), flush=True)


def one(folder: Path, reader: Reader, seed: int, number: int) -> tuple[str, dict[str, Any] | None]:
    """Damage a reader's files and read them; return ``accepted``, ``refused`` or what is wrong, and where."""
    with damaged(folder, reader, seed, number) as place:
        return outcome_of(reader, place)


@contextmanager
def damaged(folder: Path, reader: Reader, seed: int, number: int) -> Iterator[Path]:
    """Write the files of a number, a pure function of it and the seed; afterwards they are whole again."""
    place, draw = _pristine(folder, reader), random.Random(f"{seed}/{reader.name}/{number}")
    files = [path for pattern in reader.files for path in sorted(place.glob(pattern)) if path.is_file()]
    chosen = {draw.choice(files) for _ in range(draw.choice((1, 1, 1, 1, 2)))}
    whole = {path: path.read_bytes() for path in files}
    try:
        for path in sorted(chosen):
            _damage(path, whole[path], draw)
        if reader.mend is not None and draw.random() < 0.6:
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # it may be damaged beyond that
                reader.mend(place)
        yield place
    finally:
        for path, content in whole.items():
            _remove(path)
            path.write_bytes(content)


def outcome_of(reader: Reader, place: Path) -> tuple[str, dict[str, Any] | None]:
    """Read a folder; return what became of it."""
    try:
        signal.alarm(MOST_SECONDS)
        try:
            reader.read(place)
        finally:
            signal.alarm(0)
    except HangError as error:
        return "hang", _fault(error)
    except TradyError as error:
        return ("allocation", _fault(error)) if _took_memory(error) else ("refused", None)
    except Exception as error:
        return ("allocation" if _took_memory(error) else "exception"), _fault(error)
    return "accepted", None


def _damage(path: Path, content: bytes, draw: random.Random) -> None:
    kind = draw.random()
    if kind > 0.02:
        path.write_bytes(mutated(path.name, content, draw))
        return
    _remove(path)
    match draw.randrange(5):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case _:
            pass  # it is missing


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _pristine(folder: Path, reader: Reader) -> Path:
    place = folder / reader.name
    if not place.exists():
        place.mkdir(parents=True)
        reader.make(place)
    return place


def _took_memory(error: BaseException | None) -> bool:
    """Return whether memory was asked for that the limit does not allow, whatever was made of that."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "realloc of size" in str(error):
            return not isinstance(error, ResourceError) or error.__cause__ is not None
        error = error.__cause__ or error.__context__
    return False


def _fault(error: BaseException) -> dict[str, Any]:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/trady/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return {"type": type(error).__name__, "where": where, "message": ascii(str(error)[:300])}


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _too_long(number: int, frame: FrameType | None) -> None:
    raise HangError(f"more than {MOST_SECONDS} s")


if __name__ == "__main__":
    _folder, _names, _seed, _first, _last, _progress = sys.argv[1:]
    work(Path(_folder), tuple(_names.split(",")), int(_seed), int(_first), int(_last), Path(_progress))
