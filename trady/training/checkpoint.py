"""Checkpoints: a folder with tensors and JSON, both checksummed, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from trady.errors import CheckpointError
from trady.model.eager import uncompiled_name
from trady.quantized.formats import inner_tensors
from trady.records import schema
from trady.records.files import flush, remove_tree, temporary_name
from trady.records.reading import check_regular, file_digest
from trady.records.schema import AtLeast, Natural
from trady.records.tensors import joined, write_safetensors
from trady.records.translated import writing
from trady.records.versioned import Format
from trady.training.state import State

#: Version 1 had no checksum of the description, no digest of the data, and no epochs that are half done.
FORMAT = Format(
    "trady-checkpoint",
    "checkpoint",
    CheckpointError,
    "start the run again with --overwrite",
    "choose another folder",
    version=2,
    reads=(1,),
)
TENSORS = "tensors.safetensors"
DESCRIPTION = "checkpoint.json"
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        epoch: The last epoch that is done, from 0; -1 before the first is.
        step: Optimizer steps done so far.
        settings: What the run was started with; a resumed run must have the same.
        model: Fingerprint of the untouched model.
        states: State of the trainer, of the optimizer and, in the middle of an epoch, of that epoch, by name.
        data: What the data is like (:mod:`trady.training.data.identity`); ``None`` where it was not recorded.
        structure: Fingerprint of the model without its weights; empty where it was not recorded.
    """

    epoch: int
    step: int
    settings: Mapping[str, Any]
    model: str
    states: Mapping[str, State] = field(default_factory=dict)
    data: Mapping[str, Any] | None = None
    structure: str = ""


@dataclass(frozen=True)
class _TensorFile:
    """The digest of the file beside the description."""

    sha256: str


@dataclass(frozen=True)
class _Record:
    """What ``checkpoint.json`` holds."""

    epoch: Annotated[int, AtLeast(-1)]
    step: Natural
    settings: Mapping[str, Any]
    model: str
    states: Mapping[str, dict[str, Any]]
    tensors: _TensorFile
    data: Mapping[str, Any] | None = None
    structure: str = ""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; at every instant a complete checkpoint exists.

    The new one is written beside the old one; the old one is renamed out of the way, the new
    one takes its name, the old one is removed. :func:`load_checkpoint` looks in both places.

    Raises:
        ResourceError: The disk is full; the old one is as it was.
        FileError: It cannot be written there.
    """
    with writing(folder):
        _replace(folder, checkpoint)


def _replace(folder: Path, checkpoint: Checkpoint) -> None:
    temporary, previous = temporary_name(folder), _previous(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _fill(temporary, checkpoint)
        if folder.exists():
            remove_tree(previous)
            folder.rename(previous)
        temporary.rename(folder)
    except Exception:  # a full disk, mostly: what was there stays, and room is made for saying so
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(folder.parent)
    remove_tree(previous)


def _fill(place: Path, checkpoint: Checkpoint) -> None:
    tensors = joined(*((f"{name}:", state.tensors) for name, state in checkpoint.states.items()))
    write_safetensors(place / TENSORS, tensors, {"format": str(FORMAT.name)})
    description = {
        **FORMAT.header(),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "model": checkpoint.model,
        "structure": checkpoint.structure,
        "settings": dict(checkpoint.settings),
        "data": None if checkpoint.data is None else dict(checkpoint.data),
        "states": {name: dict(state.meta) for name, state in checkpoint.states.items()},
        "tensors": {"file": TENSORS, "sha256": file_digest(place / TENSORS)},
    }
    (place / DESCRIPTION).write_text(json.dumps(signed(description), indent=1), encoding="utf-8")
    for path in (place / TENSORS, place / DESCRIPTION, place):
        flush(path)


def find_checkpoint(folder: Path) -> Path | None:
    """Return where the last complete checkpoint is, ``None`` if there is none."""
    return next((place for place in (folder, _previous(folder)) if place.is_dir()), None)


def remove_leftovers(folder: Path) -> None:
    """Remove the checkpoint before the last one, which a kill in the middle of :func:`save_checkpoint` leaves."""
    if folder.is_dir():
        remove_tree(_previous(folder))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; a kill leaves it whole or not there."""
    while (place := find_checkpoint(folder)) is not None:
        remove_tree(place)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check that it is complete.

    Raises:
        CheckpointError: It is missing, damaged, not a checkpoint of trady, or of another version.
    """
    place = find_checkpoint(folder)
    if place is None:
        raise CheckpointError(f"{folder} does not exist; start the run without --resume")
    record = FORMAT.load(place / DESCRIPTION, _checked)
    tensors = _tensors(place / TENSORS, record.tensors.sha256)
    states = {name: State(_state(tensors, name), meta) for name, meta in record.states.items()}
    return Checkpoint(record.epoch, record.step, record.settings, record.model, states, record.data, record.structure)


def settings_of(folder: Path) -> Mapping[str, Any]:
    """Read what the run of a checkpoint was started with; empty where there is none.

    Raises:
        CheckpointError: It is damaged, not a checkpoint of trady, or of another version.
    """
    place = find_checkpoint(folder)
    return {} if place is None else FORMAT.load(place / DESCRIPTION, _checked).settings


def check_settings(
    checkpoint: Checkpoint, settings: Mapping[str, Any], place: Path, data: Mapping[str, Any] | None = None
) -> None:
    """Refuse to go on with other settings than the run was started with, or on other data as far as both are known."""
    mistakes = []
    if changed := differences(checkpoint.settings, settings):
        mistakes.append(f"with other settings: {'; '.join(changed)}")
    if checkpoint.data is not None and data is not None and (changed := differences(checkpoint.data, data)):
        mistakes.append(f"on other data: {'; '.join(changed)}")
    if mistakes:
        raise CheckpointError(
            f"{place} belongs to a run {', and '.join(mistakes)}; resume with the same ones, or start again in another "
            "folder or with --overwrite"
        )


def check_model(checkpoint: Checkpoint, model: str, structure: str, place: Path) -> None:
    """Refuse to go on with another model than the run was started with."""
    if checkpoint.model == model:
        return
    difference = ""
    if checkpoint.structure:
        same = checkpoint.structure == structure
        difference = ": its layers are the same, its weights are others" if same else ": its layers are others"
    raise CheckpointError(
        f"{place} is of another model{difference} ({checkpoint.model}, this one is {model}); resume with the "
        "model and the pretrained weights that the run was started with"
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what has changed, in words."""
    return [
        _difference(key, before.get(key), now.get(key))
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):  # names of classes, of which there may be a thousand
        if len(before) != len(now):
            return f"{key} were {len(before)}, are now {len(now)}"
        at = next(index for index, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
        return f"{key}: number {at} was {before[at]!r}, is now {now[at]!r}"
    return f"{key} was {before!r}, is now {now!r}"


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


def _checked(data: object) -> _Record:
    """Return a description, if it is one and nobody has changed it since."""
    description = dict(FORMAT.check(data))
    with FORMAT.reading():
        written = description.pop(_CHECKSUM, None)
        if (written is not None or description["version"] != 1) and written != _checksum(description):
            raise CheckpointError(
                "the checkpoint is damaged: it was changed, its checksum is not the one written with it; "
                f"{FORMAT.remedy}"
            )
        return schema.read(_Record, description)


def signed(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with its checksum, in the place of an earlier one."""
    plain = {key: value for key, value in description.items() if key != _CHECKSUM}
    return {**plain, _CHECKSUM: _checksum(plain)}


def _checksum(description: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(description))
    text = json.dumps(as_read, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        check_regular(path)
        if file_digest(path) != sha256:
            raise _damaged(path, "it is truncated or changed: its checksum is not the one written with it")
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    return FORMAT.read_tensors(path)


def _state(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}:"
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {reason}; {FORMAT.remedy}")


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")
