"""At the edge, whatever goes wrong with files, data, disk and memory is one sentence of ours and an exit code."""

from __future__ import annotations

import errno
import gzip
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import trady
from tests.command import MODEL, trady_here
from tests.small_task import small_net
from trady.cli import app as command
from trady.cli.commands import measure as measure_command
from trady.errors import CheckpointError, DataError, FileError, ResourceError, StateError, TradyError
from trady.records.files import write_json
from trady.records.translated import file_errors, in_our_words
from trady.records.versioned import Format
from trady.training.run import finetune


def bad_json() -> Exception:
    try:
        json.loads("{")
    except ValueError as error:
        return error
    raise AssertionError


def out_of_memory() -> Exception:
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        return error
    raise AssertionError


OURS: list[tuple[BaseException, type[TradyError], str]] = [
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), ResourceError, "a/b: the disk is full .*--resume"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceError, "the disk is full"),
    (OSError(errno.EMFILE, "Too many open files"), ResourceError, "Too many open files"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ResourceError, "--batch-size"),
    (MemoryError(), ResourceError, "memory ran out; complete files and the last checkpoint are as they were"),
    (out_of_memory(), ResourceError, "memory ran out .*can't allocate memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), ResourceError, "memory ran out"),
    (PermissionError(errno.EACCES, "Permission denied", "x.json"), FileError, "x.json: Permission denied"),
    (SafetensorError("Error: I/O error: No space left on device (os error 28)"), ResourceError, "the disk is full"),
    (SafetensorError("InvalidHeader"), FileError, r"a file is damaged, .*SafetensorError: InvalidHeader"),
    (bad_json(), FileError, "JSONDecodeError"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), FileError, "--debug shows which file"),
    (RecursionError("too deep"), FileError, "RecursionError"),
    (zipfile.BadZipFile("x"), FileError, "BadZipFile"),
    (struct.error("x"), FileError, "damaged"),
    (zlib.error("x"), FileError, "damaged"),
    (gzip.BadGzipFile("x"), FileError, "x"),
    (EOFError(), FileError, "damaged"),
]


@pytest.mark.parametrize(("error", "kind", "message"), OURS, ids=[type(error).__name__ for error, *_ in OURS])
def test_errors_of_files_disk_and_memory_are_said_in_our_words(
    error: BaseException, kind: type[TradyError], message: str
) -> None:
    told = in_our_words(error)
    assert type(told) is kind
    assert isinstance(told, OSError), "who catches OSError catches these"
    with pytest.raises(kind, match=message) as raised, file_errors():
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [KeyError("x"), BrokenPipeError(32, "gone"), RuntimeError("a fault"), AssertionError()]
)
def test_what_is_no_matter_of_files_stays_what_it_is(error: Exception) -> None:
    assert in_our_words(error) is None
    with pytest.raises(type(error)) as raised, file_errors():
        raise error
    assert raised.value is error
    ours = StateError("too early")
    assert in_our_words(ours) is ours


# -- the command line ----------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """Have ``trady measure`` end with an error."""

    def fail(*given: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("trady.cli.example.make_example", fail)
    monkeypatch.setattr(measure_command, "make_example", fail, raising=False)
    return trady_here("measure", MODEL)


@pytest.mark.parametrize(("error", "kind", "message"), OURS, ids=[type(error).__name__ for error, *_ in OURS])
def test_exit_codes_tell_refusals_from_a_lack_of_disk_or_memory(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[TradyError], message: str
) -> None:
    done = failing(monkeypatch, error)
    assert (
        done.returncode
        == (command.EXHAUSTED if kind is ResourceError else command.REFUSED)
        == (3 if kind is ResourceError else 2)
    )
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(monkeypatch, ZeroDivisionError("a fault"))


def test_debug_shows_where_an_error_of_another_library_came_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    out = tmp_path / "plan.json"
    done = trady_here("plan", MODEL, "--image-size", 8, "--budget", "elements:2000", "--out", out, "--debug")
    assert done.returncode == 3
    assert f"error: {out}: the disk is full" in done.stderr.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--ranking", "--scheme"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 100_000, b'{"format": "\\ud800"}', None, "a pipe", "a folder"]
)
def test_a_file_that_is_none_is_refused_with_code_2(tmp_path: Path, option: str, content: Any) -> None:
    place = tmp_path / "given.json"
    if content == "a pipe":
        os.mkfifo(place)
    elif content == "a folder":
        place.mkdir()
    elif content is not None:
        place.write_bytes(content)
    policy = ("--policy", "sparse-update") if option == "--scheme" else ()
    done = trady_here("plan", MODEL, "--image-size", 8, "--budget", "elements:2000", option, place, *policy)
    assert done.returncode == 2
    assert "given.json" in done.stderr.replace("\n", "")


# -- the API: files ------------------------------------------------------------------------------------------------

RECIPE = Format(None, "recipe", StateError, "cook again")


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, what in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(FileError, match=f"it is {what}, not a file; nothing was written"):
            write_json(place, {})
    assert (tmp_path / "pipe").is_fifo()


def test_a_lack_of_memory_or_descriptors_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x.json"
    place.write_text("{}")
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):

        def fail(*given: Any, error: BaseException = error) -> bytes:
            raise error

        monkeypatch.setattr("trady.records.versioned.read_bytes", fail)
        with pytest.raises(ResourceError):
            RECIPE.read_json(place)
        with pytest.raises(ResourceError):
            trady.Plan.load(place)


def test_tensors_are_read_and_refused_in_our_words(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    place = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, place)
    assert RECIPE.read_tensors(place)["a"].tolist() == [1, 1, 1]
    place.write_bytes(place.read_bytes()[:-3])
    with pytest.raises(StateError, match=r"x\.safetensors is no recipe, or is cut short .*cook again"):
        RECIPE.read_tensors(place)
    with pytest.raises(StateError, match="cannot read the recipe"):
        RECIPE.read_tensors(tmp_path / "y")


def test_a_delta_is_read_from_its_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tuner = trady.prepare(small_net(), torch.zeros(4, 3, 12, 12), budget="elements:2000")
    delta = tuner.delta()
    save_file(delta, tmp_path / "delta.safetensors")
    model = trady.apply_delta(small_net(), tmp_path / "delta.safetensors")
    again = trady.apply_delta(small_net(), delta)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    name = next(key for key in delta if key.endswith("::whole"))
    for change, said in (
        ({name: delta[name].long()}, "is torch.int64"),
        ({"features.0.weight::values": torch.ones(1)}, "has values but no channels"),
        ({"nowhere::whole": torch.ones(1)}, "does not have"),
    ):
        save_file(change, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=rf"other\.safetensors: .*{said}"):
            trady.apply_delta(small_net(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="cannot read the delta"):
        trady.apply_delta(small_net(), tmp_path / "none.safetensors")


# -- the API: data that PyTorch cannot take ------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Ragged(Dataset[Any]):
    """Images of different heights."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8 + index % 3, 8), index % 4


class Own(Ragged):
    """A data set with a fault of its own."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise KeyError("mine")


def tensors(*shape: int, dtype: torch.dtype = torch.float32, labels: torch.Tensor | None = None) -> TensorDataset:
    return TensorDataset(torch.zeros(16, *shape, dtype=dtype), torch.arange(16) % 4 if labels is None else labels)


GOOD = tensors(3, 8, 8)
BAD: dict[str, tuple[Any, str]] = {
    "ragged": (Ragged(), "examples of the data cannot be put together .*same shape"),
    "ragged in workers": (DataLoader(Ragged(), 8, num_workers=1), "cannot be put together"),
    "objects": ([(object(), 1)] * 16, "cannot be put together"),
    "pairs of labels": (tensors(3, 8, 8, labels=torch.zeros(16, 2).long()), r"labels \[8, 2\] torch.int64"),
    "no labels": (tensors(3, 8, 8, labels=torch.zeros(16, 0).long()), "no labels"),
    "bytes": (tensors(3, 8, 8, dtype=torch.uint8), r"\(8, 3, 8, 8\) uint8"),
    "one channel": (tensors(1, 8, 8), r"\(8, 1, 8, 8\) float32.*channels"),
    "small": (tensors(3, 2, 2), "Give the data as the model takes them"),
}


@pytest.mark.parametrize("place", ["train", "evaluation"])
@pytest.mark.parametrize("name", BAD)
def test_pytorchs_own_words_about_data_become_ours(name: str, place: str) -> None:
    data, message = BAD[name]
    train, evaluation = (data, GOOD) if place == "train" else (GOOD, data)
    with pytest.raises(DataError, match=message):
        finetune(net(), train, evaluation, policy="full", epochs=1, out=None, batch_size=8, progress=False)


def test_a_persons_own_errors_stay_their_own() -> None:
    with pytest.raises(KeyError, match="mine"):
        finetune(net(), Own(), GOOD, policy="full", epochs=1, out=None, batch_size=8, progress=False)

    def loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mine as well")

    with pytest.raises(RuntimeError, match="mine as well") as raised:
        finetune(net(), GOOD, GOOD, policy="full", epochs=1, out=None, batch_size=8, progress=False, loss=loss)
    assert not isinstance(raised.value, TradyError)


def test_labels_of_another_whole_type_are_class_indices_too() -> None:
    given = tensors(3, 8, 8, labels=(torch.arange(16) % 4).int())
    assert finetune(net(), given, given, policy="full", epochs=1, out=None, batch_size=8, progress=False).accuracy >= 0


def test_a_full_disk_in_a_run_is_said_and_what_was_complete_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"policy": "full", "out": tmp_path / "run", "batch_size": 8, "progress": False}
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        finetune(net(), GOOD, GOOD, epochs=3, **options)
    monkeypatch.undo()
    result = finetune(net(), GOOD, GOOD, epochs=3, resume=True, **options)
    assert len(result.history) == 3


def test_paths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        trady.load_data(f"{tmp_path}/d\0.npz", image_size=4)
    with pytest.raises(CheckpointError, match="null byte"):
        trady.Plan.load("a\0b")
