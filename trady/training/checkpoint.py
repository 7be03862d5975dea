"""Checkpoints: a folder with tensors and JSON, replaced after each epoch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trady.errors import CheckpointError
from trady.model.eager import uncompiled_name
from trady.quantized.formats import inner_tensors
from trady.records.files import flush, separate
from trady.records.reading import check_regular
from trady.records.schema import Natural
from trady.records.versioned import Format
from trady.training.state import State

FORMAT = Format(
    "trady-checkpoint", "checkpoint", CheckpointError, "start the run again with --overwrite", "choose another folder"
)
TENSORS = "tensors.safetensors"
DESCRIPTION = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        epoch: The last epoch that is done, from 0.
        step: Optimizer steps done so far.
        settings: What the run was started with; a resumed run must have the same.
        model: Fingerprint of the untouched model.
        states: State of the trainer and of the optimizer, by name.
    """

    epoch: int
    step: int
    settings: Mapping[str, Any]
    model: str
    states: Mapping[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class _TensorFile:
    """The digest of the file beside the description."""

    sha256: str


@dataclass(frozen=True)
class _Record:
    """What ``checkpoint.json`` holds."""

    epoch: Natural
    step: Natural
    settings: Mapping[str, Any]
    model: str
    states: Mapping[str, dict[str, Any]]
    tensors: _TensorFile


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; at every instant a complete checkpoint exists.

    The new one is written beside the old one; the old one is renamed out of the way, the new
    one takes its name, the old one is removed. :func:`load_checkpoint` looks in both places.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"{name}:{k}": v for name, state in checkpoint.states.items() for k, v in state.tensors.items()}
    save_file(separate(tensors), temporary / TENSORS, {"format": str(FORMAT.name)})
    description = {
        **FORMAT.header(),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "model": checkpoint.model,
        "settings": dict(checkpoint.settings),
        "states": {name: dict(state.meta) for name, state in checkpoint.states.items()},
        "tensors": {"file": TENSORS, "sha256": _digest(temporary / TENSORS)},
    }
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
    for path in (temporary / TENSORS, temporary / DESCRIPTION, temporary):
        flush(path)
    previous = _previous(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Return where the last complete checkpoint is, ``None`` if there is none."""
    return next((place for place in (folder, _previous(folder)) if place.is_dir()), None)


def remove_leftovers(folder: Path) -> None:
    """Remove the incomplete checkpoint that a killed run has left."""
    for path in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir():
        shutil.rmtree(_previous(folder), ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check that it is complete.

    Raises:
        CheckpointError: It is missing, damaged, not a checkpoint of trady, or of another version.
    """
    place = find_checkpoint(folder)
    if place is None:
        raise CheckpointError(f"{folder} does not exist; start the run without --resume")
    record = FORMAT.load(place / DESCRIPTION, partial(FORMAT.read, _Record))
    tensors = _tensors(place / TENSORS, record.tensors.sha256)
    states = {name: State(_state(tensors, name), meta) for name, meta in record.states.items()}
    return Checkpoint(record.epoch, record.step, record.settings, record.model, states)


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], place: Path) -> None:
    """Refuse to go on with other settings than the run was started with."""
    keys = sorted({*checkpoint.settings, *settings})
    changed = [
        f"{key} was {checkpoint.settings.get(key)!r}, is now {settings.get(key)!r}"
        for key in keys
        if checkpoint.settings.get(key) != settings.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{place} belongs to a run with other settings: {'; '.join(changed)}; "
            "resume with the same ones, or start again in another folder or with --overwrite"
        )


def fingerprint(model: nn.Module, without: frozenset[str] = frozenset()) -> str:
    """Return sixteen digits that name a model: its tensors' names, shapes, dtypes and contents.

    Args:
        model: The model, untouched.
        without: Tensors whose contents do not count (the head, which a user may initialise again).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{uncompiled_name(name)} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for inner in inner_tensors(tensor) if name not in without else ():
            if inner.numel():
                bits: Any = inner.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                digest.update(memoryview(bits))
    return digest.hexdigest()[:16]


def _tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        check_regular(path)
        if _digest(path) != sha256:
            raise _damaged(path, "it is truncated or changed: its checksum is not the one written with it")
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    return FORMAT.read_tensors(path)


def _state(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}:"
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {reason}; {FORMAT.remedy}")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")
