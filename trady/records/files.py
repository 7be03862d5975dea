"""Files that are complete or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trady.errors import FileError, TradyError
from trady.records.reading import other_kind
from trady.records.translated import at, in_our_words


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then rename it to ``path``.

    Raises:
        ResourceError: The disk is full; the file is as it was before.
        FileError: It cannot be written there, or a folder, a device or a pipe is there, which would be replaced.
    """
    if path.exists() and (kind := other_kind(path.stat().st_mode)) is not None:
        raise FileError(f"{path}: {kind}; nothing was written: name a file")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except TradyError:
        raise
    except (OSError, SafetensorError) as error:
        raise (in_our_words(at(error, path)) or error) from error
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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    ready = separate(tensors)
    write_whole(path, lambda place: save_file(ready, place, metadata))


def separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors contiguous, on the CPU, each with a storage of its own."""
    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        ready[name] = value
    return ready


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, outlive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # folders cannot be opened on every system
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
