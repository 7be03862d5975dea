"""Runs that stop in the middle of an epoch, and go on there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from tests.command import start
from tests.small_runs import lines, run, without_clock
from tests.small_task import Raise, small_data, write_npz
from trady.errors import TrainingError
from trady.training import interrupt
from trady.training.checkpoint import load_checkpoint
from trady.training.durations import parse_seconds
from trady.training.interrupt import Interrupts, Stopped
from trady.training.progress import Silent
from trady.training.randomness import random_state, reading_randomness, set_random_state
from trady.training.within_epoch import WITHIN


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """SIGHUP is not ignored, as it is for all that nohup starts."""
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
    before = signal.signal(hangup, signal.SIG_DFL)
    yield
    signal.signal(hangup, before)


posix = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a system without SIGHUP")


class Shaken(Dataset[tuple[torch.Tensor, int]]):
    """Images that take random numbers of every kind, as transforms do."""

    def __init__(self) -> None:
        self.images = small_data(48, 0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return image + torch.rand(()) + np.random.random() + random.random(), label  # noqa: NPY002


SETTINGS: dict[str, dict[str, Any]] = {
    "trady, learning its ranking": {"ranking": "online", "momentum": 0.9},
    "augmented, AdamW": {"augment": "light", "optimizer": "adamw", "lr": 0.01},
    "several draws": {"policy": "dynamic-random", "draws_per_epoch": 3, "momentum": 0.9},
    "evidence of each epoch": {"policy": "velocity", "budget": "update:16 KiB", "observed_batches": 2, "momentum": 0.9},
    "micro-batches": {"micro_batch": 3},
    "updates in backward": {"optimizer": "adamw-in-backward", "lr": 0.01},
    "full": {"policy": "full", "momentum": 0.9},
    "full, random data": {"policy": "full", "data": (Shaken(), small_data(24, 1))},
    "a shuffled loader": {
        "policy": "full",
        "data": (lambda: DataLoader(Shaken(), 8, shuffle=True), small_data(24, 1)),
    },
    "trady, random data": {"data": (Shaken(), small_data(24, 1))},
}


def settings(name: str) -> dict[str, Any]:
    given = {"epochs": 2, **SETTINGS[name]}
    if "data" in given and not isinstance(given["data"][0], Dataset):
        given["data"] = (given["data"][0](), given["data"][1])
    return given


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_stopped_inside_an_epoch_ends_bit_for_bit_where_the_unbroken_one_does(
    tmp_path: Path, name: str
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run(unbroken, **settings(name))
    # In the first epoch, at its last step, in the second; six steps an epoch.
    for number, at in ((signal.SIGINT, 2), (signal.SIGTERM, 4), (signal.SIGINT, 3)):
        with pytest.raises((KeyboardInterrupt, Stopped)):
            run(broken, resume=True, progress=Raise(number, at), **settings(name))
    saved = load_checkpoint(broken / "checkpoint")
    assert (saved.epoch, saved.step) == (0, 9)
    assert saved.states[WITHIN].meta["sums"]["batches"] == 3
    run(broken, resume=True, **settings(name))
    assert without_clock(lines(broken)) == without_clock(lines(unbroken))
    for file in ("model.safetensors", "best.safetensors"):
        ended, expected = load_file(broken / file), load_file(unbroken / file)
        assert all(torch.equal(ended[key], expected[key]) for key in expected)
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in unbroken.iterdir())


def test_a_run_that_is_saved_at_every_step_is_the_one_that_is_not(tmp_path: Path) -> None:
    run(tmp_path / "often", checkpoint_every=1e-9, epochs=2)
    run(tmp_path / "never", epochs=2, keep_best=False)
    assert not (tmp_path / "never" / "best.safetensors").exists()
    assert (tmp_path / "often/model.safetensors").read_bytes() == (tmp_path / "never/model.safetensors").read_bytes()
    assert without_clock(lines(tmp_path / "often")) == without_clock(lines(tmp_path / "never"))


def test_a_checkpoint_inside_an_epoch_is_written_when_it_is_time(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watch(Silent):
        def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
            if (tmp_path / "run" / "checkpoint").exists():
                saved = load_checkpoint(tmp_path / "run" / "checkpoint")
                seen.append((saved.epoch, saved.step))

    run(tmp_path / "run", policy="full", checkpoint_every="0.0001 s", epochs=2, progress=Watch())
    assert seen == [*((-1, step) for step in range(1, 6)), *((0, step) for step in range(6, 12))]
    seen.clear()
    run(tmp_path / "run", policy="full", checkpoint_every="3 h", epochs=2, progress=Watch(), overwrite=True)
    assert set(seen) == {(0, 6)}


def test_what_is_stopped_in_the_evaluation_evaluates_and_trains_no_step_again(tmp_path: Path) -> None:
    class Slow(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self, at: int | None) -> None:
            self.images, self.at = small_data(24, 1), at

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == self.at:
                signal.raise_signal(signal.SIGINT)
            return self.images[index]

    class Count(Silent):
        steps = 0

        def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
            Count.steps += 1

    whole = run(tmp_path / "whole", policy="full", epochs=1)
    with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
        run(tmp_path / "run", policy="full", epochs=1, data=(small_data(48, 0), Slow(9)))
    again = run(tmp_path / "run", policy="full", epochs=1, data=(small_data(48, 0), Slow(None)), resume=True,
                progress=Count())  # fmt: skip
    assert Count.steps == 0
    assert again.history[0].accuracy == whole.history[0].accuracy
    assert again.history[0].train_loss == whole.history[0].train_loss


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_run_and_says_so_and_leaves_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    number = signal.Signals[name]
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, policy="full", progress=Raise(number, 8))
    assert caught.value.code == 128 + number
    assert f"{name}: stopped; the last checkpoint is kept in {tmp_path / 'checkpoint'}: go on with --resume" in (
        capsys.readouterr().err
    )
    assert load_checkpoint(tmp_path / "checkpoint").step == 8
    assert signal.getsignal(number) == signal.SIG_DFL
    with pytest.raises(SystemExit):
        run(None, policy="full", progress=Raise(number, 1))
    assert f"{name}: stopped, and nothing is kept: there is no run folder" in capsys.readouterr().err


@posix
@pytest.mark.parametrize("in_a_step", [False, True])
def test_readers_that_the_same_signal_has_ended_do_not_hide_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_a_step: bool
) -> None:
    """As where a scheduler signals all processes of a job, or a terminal is closed."""

    def killed(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    class Read(Dataset[tuple[torch.Tensor, int]]):
        reads, whole = 0, small_data(48, 0)

        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            self.reads += 1
            if self.reads == 25 and not in_a_step:
                killed()
            return self.whole[index]

    class Step(Silent):
        steps = 0

        def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
            self.steps += 1
            if self.steps == 4 and in_a_step:
                killed()

    with pytest.raises(Stopped):
        run(tmp_path, policy="full", data=(Read(), small_data(24, 1)), progress=Step(), checkpoint_every=1e-9)
    assert "SIGTERM: stopped; the last checkpoint is kept" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint").step == 3  # the fourth is half done, or not read


@posix
def test_handlers_of_the_user_and_what_nohup_ignores_are_left_alone() -> None:
    for handler in (signal.SIG_IGN, lambda *_: None):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with Interrupts() as interrupts:
                assert signal.getsignal(signal.SIGHUP) == handler
                assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
                signal.raise_signal(signal.SIGHUP)
                interrupts.check()
        finally:
            signal.signal(signal.SIGHUP, before)


STUCK = """
import hashlib, sys
from trady.training import interrupt
from trady.training import run as module
interrupt.LEAVE_SECONDS = 0.2
with interrupt.Interrupts(lambda name: f"{name}: the last checkpoint is kept"):
    print("in a step", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one operation, of half an hour
"""


@posix
def test_a_step_that_does_not_end_is_left_by_a_request_to_stop() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in a step\n"
    time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "SIGTERM: the last checkpoint is kept\n"
    assert interrupt.LEAVE_SECONDS < 10


@posix
def test_the_command_leaves_after_sigterm_and_goes_on(tmp_path: Path) -> None:
    data, out = write_npz(tmp_path / "data.npz"), tmp_path / "run"
    arguments = ["finetune", "tests.small_task:small_net", data, "--policy", "full", "--image-size", "12",
                 "--batch-size", "8", "--out", out, "--checkpoint-every", "1h", "--epochs"]  # fmt: skip
    process = start(*arguments, "500")
    while not (out / "checkpoint").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert f"SIGTERM: stopped; the last checkpoint is kept in {out / 'checkpoint'}: go on with --resume" in err
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_random_numbers_come_back_and_those_of_reading_do_not_move_the_others() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.normal()), random.gauss(0, 1)  # noqa: NPY002

    draw()
    state = random_state()
    first = draw(), draw()
    set_random_state(state)
    with reading_randomness(1, 2, 3):
        there = draw()
    assert (draw(), draw()) == first
    with reading_randomness(1, 2, 3):
        assert draw() == there
    with reading_randomness(1, 2, 4):
        assert draw() != there


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("10min", 600), ("90 s", 90), ("1.5h", 5400), ("2 H", 7200), (30, 30), (0.5, 0.5), ("3m", 180)],
)
def test_lengths_of_time_are_read(given: Any, seconds: float) -> None:
    assert parse_seconds(given, "checkpoint_every") == seconds


@pytest.mark.parametrize("given", ["10", "soon", "0s", -1, float("nan"), "1 day", "1min30"])
def test_other_lengths_of_time_are_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(TrainingError, match="checkpoint_every is"):
        run(tmp_path / "run", policy="full", checkpoint_every=given)
    assert not (tmp_path / "run").exists()


def test_reading_goes_on_without_reading_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    data = small_data(48, 0)
    original = type(data).__getitems__

    def watched(self: Any, indices: Any) -> Any:
        if len(self) == 48:
            read.extend(indices)
        return original(self, indices)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, policy="full", epochs=1, progress=Raise(signal.SIGINT, 4), data=(data, small_data(24, 1)))
    monkeypatch.setattr(type(data), "__getitems__", watched)
    run(tmp_path, policy="full", epochs=1, resume=True, data=(data, small_data(24, 1)))
    assert len(read) == 16
