"""Damaged files, a few of each reader: accepted, or refused with an error of trady's. And every fault found so far."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fuzz import __main__ as command
from benchmarks.fuzz import mutations, samples, worker
from benchmarks.fuzz.readers import READERS, Reader
from tests.little_memory import little_memory
from trady import load_data
from trady.errors import CheckpointError, DataError, ModelError, StateError
from trady.ops import native
from trady.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from trady.training.randomness import random_state, set_random_state
from trady.training.state import State, load_optimizer_state, optimizer_to_state

BY_NAME = {reader.name: reader for reader in READERS}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_damaged_files_are_accepted_or_refused(files: Path, reader: Reader) -> None:
    if reader.name == "configuration":
        pytest.importorskip("transformers")
    found = {outcome_of(files, reader, number) for number in range(40)}
    assert found <= {"accepted", "refused"}
    assert "refused" in found or reader.name == "kernels"


def outcome_of(files: Path, reader: Reader, number: int) -> str:
    outcome, fault = worker.one(files, reader, 0, number)
    return outcome if fault is None else f"{number}: {outcome}: {fault}"


def test_a_number_always_gives_the_same_files_and_they_are_whole_again_afterwards(files: Path) -> None:
    reader = BY_NAME["matrix"]
    found = []
    for _ in range(2):
        with worker.damaged(files, reader, 7, 3) as place:
            found.append((place / "matrix.toml").read_bytes() + (place / "scheme.json").read_bytes())
    assert found[0] == found[1]
    assert found[0] != samples.MATRIX.encode() + (files / "matrix" / "scheme.json").read_bytes()
    reader.read(files / "matrix")


def faulty(read: Callable[[Path], Any]) -> Reader:
    return Reader("plan", samples.records, read, ("plan.json",))


def test_what_a_reader_does_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(folder: Path) -> None:
        raise KeyError("x")

    def takes(folder: Path) -> None:
        raise CheckpointError("in our words") from MemoryError()

    def hangs(folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(worker, "MOST_SECONDS", 1)
    handler = signal.signal(signal.SIGALRM, worker._too_long)
    try:
        told = {read.__name__: worker.outcome_of(faulty(read), tmp_path)[0] for read in (raises, takes, hangs)}
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert told == {"raises": "exception", "takes": "allocation", "hangs": "hang"}


def test_the_command_counts_every_file_and_goes_on_after_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that ends at its fifth file, and one that reads the rest."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, struct, json, os\n"
        "first, last, progress = int(sys.argv[6]), int(sys.argv[7]), sys.argv[8]\n"
        "for n in range(first, last):\n"
        "    open(progress, 'wb').write(struct.pack('<q', n))\n"
        "    if n == 4: os.abort()\n"
        "    print(json.dumps({'counts': {'plan refused': 1}}), flush=True)\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda given, **more: real([sys.executable, str(script), *given[1:]], **more)
    )
    monkeypatch.setattr(sys, "argv", ["fuzz", "--files", "9", "--reader", "plan", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["counts"] == {"plan refused": 8, "plan crash": 1}
    assert "exit code -6" in capsys.readouterr().out


def test_values_are_drawn_as_copies() -> None:
    before = repr(mutations._VALUES)
    draw = Random(0)
    for _ in range(300):
        mutations.json_of(json.dumps({"a": [1, {"b": 2}], "c": "d"}).encode(), draw)
    assert repr(mutations._VALUES) == before


# -- found, and never again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.pop("lr"), "a group lacks lr"),
        (lambda group: group.update(lr="0.1"), "not a number"),
        (lambda group: group.update(lr=10**30), "does not fit in 64 bits"),
        (lambda group: group.update(betas=[0.9, 7.0]), "Invalid beta parameter"),
        (lambda group: group.update(amsgrad=3), "amsgrad of a group is 3"),
        (lambda group: group.update(fused="x"), "is 'x', not a number"),
        (lambda group: group.update(capturable=True), "capturable=True"),
        (lambda group: group.update(params=[0]), r"its groups have \[1\] parameters, and there are \[2\]"),
        (lambda group: group.update(params=["0"]), "not a whole number"),
    ],
)
def test_options_of_an_optimizer_that_it_cannot_have_are_refused(change: Callable[[Any], Any], message: str) -> None:
    optimizer, state = adam()
    meta = json.loads(json.dumps(state.meta))
    load_optimizer_state(optimizer, State(state.tensors, json.loads(json.dumps(meta))))
    change(meta["param_groups"][0])
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_state(optimizer, State(state.tensors, meta))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("0/exp_avg"), "lacks exp_avg"),
        (lambda tensors: tensors.update({"0/exp_avg": torch.zeros(5, 3)}), r"is \[5, 3\], and the parameter \[4, 3\]"),
        (lambda tensors: tensors.update({"0/exp_avg": torch.zeros(4, 3, dtype=torch.complex64)}), "complex64"),
        (lambda tensors: tensors.update({"0/exp_avg": torch.zeros(())}), r"is \[\], and the parameter"),
        (lambda tensors: tensors.update({"0/step": torch.tensor(-1e9)}), "step of parameter 0 is -1000000000.0"),
        (lambda tensors: tensors.update({"0/step": torch.tensor(float("nan"))}), "step of parameter 0 is nan"),
        (lambda tensors: tensors.update({"0/step": torch.zeros(4, 3)}), r"step of parameter 0 is \[4, 3\]"),
        (lambda tensors: tensors.update({"0/step": torch.zeros(3)}), r"step of parameter 0 is \[3\]"),
        (lambda tensors: tensors.update({"9/exp_avg": torch.zeros(1)}), "which is in no group"),
        (lambda tensors: tensors.update({"x/exp_avg": torch.zeros(1)}), "damaged"),
        (lambda tensors: tensors.update({"exp_avg": torch.zeros(1)}), "damaged"),
    ],
)
def test_state_of_an_optimizer_that_it_cannot_have_is_refused(change: Callable[[Any], Any], message: str) -> None:
    optimizer, state = adam()
    tensors = dict(state.tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_state(optimizer, State(tensors, state.meta))


def adam() -> tuple[torch.optim.Optimizer, State]:
    parameters = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(2, 3))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer, optimizer_to_state(optimizer)


def test_earlier_weights_of_a_channel_that_does_not_exist_take_no_memory() -> None:
    tuner, _ = samples.session("velocity")
    state = json.loads(json.dumps({"meta": tuner.state_dict()["meta"]}))
    state["tensors"] = tuner.state_dict()["tensors"]
    assert state["meta"]["earlier"]
    state["meta"]["earlier"][0]["channels"] = [1 << 29]
    with pytest.raises(CheckpointError, match=r"damaged .*its earlier weights are of channel 536870912"):
        tuner.load_state_dict(state)


def test_class_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    names = np.array(["a", "b"])
    names.view(np.uint32)[0] = 0x7FFFFFFF
    np.savez(tmp_path / "d.npz", images=np.zeros((4, 4, 4), np.uint8), labels=np.array([0, 1, 0, 1]), classes=names)
    with pytest.raises(DataError, match="classes holds what is no text"):
        load_data(tmp_path / "d.npz", image_size=4)


def test_a_chunk_of_an_image_that_says_it_is_huge_takes_no_memory(tmp_path: Path) -> None:
    samples.pictures(tmp_path)
    place = tmp_path / "photos" / "cat" / "0.png"
    content = place.read_bytes()
    at = content.index(b"IDAT")
    place.write_bytes(content[: at - 4] + b"\xf0\0\0\0" + content[at:])
    with little_memory(1 << 30):  # its pixels are all there
        found = load_data(tmp_path / "photos", image_size=8)
    assert len(found.train) + len(found.evaluation) == 7


def test_a_header_of_numpys_that_does_not_end_is_refused(tmp_path: Path) -> None:
    import zipfile

    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (((((\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        for name in ("images", "labels"):
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(tmp_path / "d.npz", image_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architectures": [0.5]}, "AttributeError"), ({"num_hidden_layers": 10**9}, "no model has more than 2000")],
)
def test_a_configuration_of_no_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    from trady.training.models.from_config import skeleton

    samples.configuration(tmp_path)
    place = tmp_path / "model" / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        skeleton(str(tmp_path / "model"), 3, tokens=False, length=None, dtype=None)


def test_a_folder_in_the_place_of_kernels_is_none(tmp_path: Path) -> None:
    (tmp_path / f"kernels-{'0' * 16}-5-abc.so").mkdir()
    assert native._kept(tmp_path, "0" * 16) is None


def test_a_study_of_endless_epochs_is_refused_at_once(files: Path) -> None:
    reader = BY_NAME["study"]
    place = worker._pristine(files, reader)
    settings = place / "study" / "settings.json"
    whole = settings.read_text()
    try:
        settings.write_text(json.dumps({**json.loads(whole), "epochs": 1 << 40}))
        with pytest.raises(StateError, match="lacks the records of tiny, seed 0, epoch 2"):
            reader.read(place)
    finally:
        settings.write_text(whole)


def test_a_result_of_endless_epochs_takes_no_memory(files: Path) -> None:
    reader = BY_NAME["cells"]
    place = worker._pristine(files, reader)
    result = place / "done" / "result.json"
    whole = result.read_text()
    try:
        result.write_text(json.dumps({**json.loads(whole), "epochs": 1 << 40}))
        with pytest.raises(CheckpointError, match="does not have the epochs 0 to 1099511627775"):
            reader.read(place)
    finally:
        result.write_text(whole)


def test_a_pipe_in_the_place_of_a_record_keeps_nobody_waiting(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(0, 1, {}, "", {}))
    for name in ("checkpoint.json", "tensors.safetensors"):
        content = (tmp_path / "checkpoint" / name).read_bytes()
        (tmp_path / "checkpoint" / name).unlink()
        os.mkfifo(tmp_path / "checkpoint" / name)
        with pytest.raises(CheckpointError, match="it is a pipe, not a file"):
            load_checkpoint(tmp_path / "checkpoint")
        (tmp_path / "checkpoint" / name).unlink()
        (tmp_path / "checkpoint" / name).write_bytes(content)


def test_random_numbers_that_are_one_number_are_refused() -> None:
    state = random_state()
    tensors = {**state.tensors, "numpy": torch.tensor(3)}
    with pytest.raises(CheckpointError, match="random numbers are damaged"):
        set_random_state(State(tensors, state.meta))


@pytest.mark.parametrize("speed", [0.0, -1.0, 1e-320])
def test_a_cell_whose_speed_nothing_can_be_divided_by_is_refused(files: Path, speed: float) -> None:
    reader = BY_NAME["cells"]
    place = worker._pristine(files, reader)
    metrics = place / "done" / "metrics.jsonl"
    whole = metrics.read_text()
    try:
        lines = [json.dumps({**json.loads(line), "samples_per_second": speed}) for line in whole.splitlines()]
        metrics.write_text("\n".join(lines) + "\n")
        with pytest.raises(CheckpointError, match="does not have the epochs"):
            reader.read(place)
    finally:
        metrics.write_text(whole)
