"""A run of ``finetune`` that goes on in another number of processes: the same steps, the same draws, the same ends."""

from __future__ import annotations

import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.ranks import Raised, together
from tests.small_runs import lines, run
from tests.small_task import small_data
from trady.errors import CheckpointError
from trady.training.interrupt import Stopped
from trady.training.sharing import share_of_step
from trady.training.within_epoch import EpochSums, shared_by, state_names

SETUPS: dict[str, dict[str, Any]] = {
    "trady, ranking learnt": {"policy": "trady", "ranking": "online", "optimizer": "adamw", "lr": 0.01},
    "velocity": {"policy": "velocity", "budget": "update:24 KiB", "momentum": 0.9, "draws_per_epoch": 2},
    "full": {"policy": "full", "budget": None, "momentum": 0.9},
}


class Loss:
    """Cross entropy that has the run stopped at a step."""

    def __init__(self, stops_at: int) -> None:
        self.left = stops_at

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        self.left -= torch.is_grad_enabled()
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return nn.functional.cross_entropy(output, labels)


def trained(rank: int, processes: int, *, out: Path, setup: str, stops_at: int = -1, batch_size: int = 8) -> list[str]:
    """Train or go on until a step, or the end; return what it has warned of."""
    data = small_data(96, 0), small_data(24, 1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            run(out, data=data, loss=Loss(stops_at), mode="eval", resume=True, batch_size=batch_size, **SETUPS[setup])
        except Stopped:
            assert stops_at > 0
    return [str(each.message) for each in warned]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every setup unbroken in two processes, and as 2, 4 and 1 processes, stopped in the middle of epochs."""
    folder = tmp_path_factory.mktemp("runs")
    told: dict[str, dict[str, Any]] = {name: {} for name in SETUPS}

    def phase(name: str, processes: int, out: str, **options: Any) -> None:
        (place := folder / name).mkdir()
        each = {setup: partial(trained, out=folder / setup / out, setup=setup, **options) for setup in SETUPS}
        for setup, said in together(each, place, processes).items():
            told[setup][name] = said

    for setup in SETUPS:
        (folder / setup).mkdir()
    phase("unbroken", 2, "unbroken")
    phase("first", 2, "moved", stops_at=6)  # after the last batch of an epoch, before its evaluation
    phase("second", 4, "moved", stops_at=3, batch_size=4)
    for setup in SETUPS:
        told[setup]["third"] = [trained(0, 1, out=folder / setup / "moved", setup=setup)]
    return folder, told


@pytest.mark.parametrize("setup", SETUPS)
def test_two_four_and_one_process_end_where_two_do(folders: Any, setup: str) -> None:
    folder, told = folders
    assert not any(isinstance(each, Raised) for said in told[setup].values() for each in said), [
        s[0] for s in told[setup].values()
    ]
    expected, found = (lines(folder / setup / name) for name in ("unbroken", "moved"))
    for before, after in zip(expected, found, strict=True):
        assert [before[key] for key in ("step", "lr", "selection_hash")] == [
            after[key] for key in ("step", "lr", "selection_hash")
        ]
        for key in ("train_loss", "evaluation_loss"):
            assert after[key] == pytest.approx(before[key], rel=1e-5)
    assert [line["averaged_bytes"] > 0 for line in found] == [True, True, False]
    weights = load_file(folder / setup / "moved" / "model.safetensors")
    for key, value in load_file(folder / setup / "unbroken" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("setup", SETUPS)
def test_the_first_process_says_what_changes(folders: Any, setup: str) -> None:
    _, told = folders
    second, third = told[setup]["second"], told[setup]["third"]
    text = "the run was started in 2 processes of 8 samples a step; it goes on in 4 of 4. A step has the same 16"
    assert [sum(text in each for each in said) for said in second] == [1, 0, 0, 0]
    assert any("it goes on in 1 of 16" in each for each in third[0])


def test_processes_that_cannot_share_a_step_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", epochs=1)
    checkpoint = tmp_path / "run" / "checkpoint"
    asked = partial(share_of_step, checkpoint, fixed=False, speaks=False)
    with pytest.raises(
        CheckpointError, match=r"has 8 samples \(1 processes? of 8\), which 3 .* go on in 1, 2, 4, 8 of"
    ):
        asked(8, 3)
    assert (asked(8, 1).batch_size, asked(8, 4).batch_size, asked(2, 4).batch_size) == (8, 2, 2)
    assert asked(3, 4).started_batch_size == 3, "other settings are refused where these are compared"
    with pytest.raises(CheckpointError, match="give one with batch_size=2"):
        asked(8, 4, fixed=True)
    assert asked(2, 4, fixed=True).batch_size == 2


def test_a_loader_of_ones_own_goes_on_with_the_batches_that_it_has(tmp_path: Path) -> None:
    data = DataLoader(small_data(48, 0), batch_size=8), small_data(24, 1)
    run(tmp_path / "run", epochs=1, data=data)
    with pytest.raises(CheckpointError, match="batch_size was 8, is now 4"):
        run(tmp_path / "run", epochs=1, data=(DataLoader(small_data(48, 0), batch_size=4), data[1]), resume=True)


def test_what_processes_have_added_up_is_not_lost_and_not_counted_twice() -> None:
    saved = [EpochSums(1, batches=3, steps=9, examples=10 + i, loss=2.0 + i) for i in range(4)]
    states = {name: sums.to_state() for name, sums in zip(state_names(4), saved, strict=True)}
    for processes in (1, 2, 4, 8):
        found = [shared_by(states, process, processes) for process in range(processes)]
        assert sum(sums.examples for sums, _ in found) == 46
        assert sum(sums.loss for sums, _ in found) == 14.0
        assert all((sums.batches, sums.steps) == (3, 9) for sums, _ in found)
        assert [random is None for _, random in found] == [process >= 4 for process in range(processes)]
    del states["epoch-2"]
    with pytest.raises(CheckpointError, match="lacks epoch-2"):
        shared_by(states, 0, 4)
