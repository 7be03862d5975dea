"""Runs of ``finetune`` whose passes are replayed, and what stops them from it: no CUDA device is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import trady
from tests.simulated_graph import SimulatedGraph
from tests.small_runs import run
from tests.small_task import StopAfter, small_data, small_net, write_npz
from trady.cli.app import app
from trady.training.batch import check_labels, cross_entropy
from trady.tuner.capture import CapturedStep

#: Without dropout: a simulated graph draws its numbers when it records, too.
STILL: dict[str, Any] = {"policy": "dynamic-random", "mode": "eval"}

#: Steps of an epoch that are not replayed: the measured one, and those that warm up.
FIRST = 3


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the run were on CUDA."""
    SimulatedGraph.made = []
    original = trady.Tuner.capture

    def capture(tuner: trady.Tuner, step: Callable[..., Any]) -> CapturedStep:
        made = original(tuner, step)
        return CapturedStep(made._step, made._about, lambda: SimulatedGraph(lambda: made._about.trained))

    monkeypatch.setattr(trady.Tuner, "capture", capture)
    monkeypatch.setattr("trady.training.run.refuse_capture", lambda policy, device: None)


def losses(result: Any) -> list[float]:
    return [epoch.train_loss for epoch in result.history]


def quiet_run(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", trady.TradyWarning)
        return run(None, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_with_replayed_passes_is_the_same(optimizer: str) -> None:
    options = {**STILL, "optimizer": optimizer, "lr": 0.01}
    plain, replayed = quiet_run(**options), quiet_run(**options, capture=True)
    assert losses(replayed) == losses(plain)
    wanted, got = plain.model.state_dict(), replayed.model.state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert len(SimulatedGraph.made) == 3, "one an epoch"
    assert [graph.replays for graph in SimulatedGraph.made] == [6 - FIRST] * 3


def test_a_draw_inside_an_epoch_is_recorded_anew() -> None:
    options = {**STILL, "draws_per_epoch": 2, "epochs": 2, "data": (small_data(96, 0), small_data(24, 1))}
    assert losses(quiet_run(**options, capture=True)) == losses(quiet_run(**options))
    assert len(SimulatedGraph.made) == 4


def test_parts_of_a_batch_are_replayed_and_add_up() -> None:
    options = {**STILL, "micro_batch": 4}
    assert losses(quiet_run(**options, capture=True)) == losses(quiet_run(**options))
    assert [graph.replays for graph in SimulatedGraph.made] == [2 * 5 - 2] * 3


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", **STILL)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", **STILL, progress=StopAfter(2), capture=True)
    assert losses(run(tmp_path / "run", **STILL, resume=True, capture=True)) == losses(plain)


def test_a_batch_of_another_shape_is_said_once_and_runs() -> None:
    data = small_data(44, 0), small_data(24, 1)
    plain = quiet_run(**STILL, data=data)
    with pytest.warns(trady.TradyWarning) as warned:
        result = run(None, **STILL, data=data, capture=True)
    assert losses(result) == losses(plain)
    once(warned, "a step runs uncaptured: its batch is not of the recorded shape")
    assert all(graph.replays == 5 - FIRST for graph in SimulatedGraph.made)


def while_recording(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is being recorded."""
    now: list[bool] = []
    usual = SimulatedGraph.record

    def record(graph: SimulatedGraph, run: Callable[[], Any]) -> Any:
        now.append(True)
        try:
            return usual(graph, run)
        finally:
            now.clear()

    monkeypatch.setattr(SimulatedGraph, "record", record)
    return now


class Reads(nn.Module):
    """A model that decides by a value that it has computed."""

    def __init__(self, net: nn.Module, recording: list[bool]) -> None:
        super().__init__()
        self.net, self._recording = net, recording

    def forward(self, x: Tensor) -> Tensor:
        if self._recording:  # what CUDA says to .item() then
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return self.net(x)


def once(warned: Any, text: str) -> None:
    said = [str(w.message) for w in warned if issubclass(w.category, trady.TradyWarning)]
    assert len(said) == 1
    assert text in said[0]


def test_a_model_that_reads_values_on_the_host_is_said_once_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = while_recording(monkeypatch)
    plain = quiet_run(**STILL, model=Reads(small_net(), recording))
    with pytest.warns(trady.TradyWarning) as warned:
        result = run(None, **STILL, model=Reads(small_net(), recording), capture=True)
    once(warned, "a step runs uncaptured: it cannot be recorded (RuntimeError: CUDA error: operation not permitted")
    assert losses(result) == losses(plain)
    assert len(SimulatedGraph.made) == 1, "not tried again"


def test_a_loss_that_reads_values_on_the_host_is_said_once_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = while_recording(monkeypatch)

    def loss(output: Any, labels: Tensor) -> Tensor:
        if recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return cross_entropy(output, labels)

    with pytest.warns(trady.TradyWarning) as warned:
        run(None, **STILL, loss=loss, capture=True)
    once(warned, "operation not permitted")


@pytest.mark.parametrize("error", [RuntimeError("CUDA graphs need CUDA 11 or later"), AttributeError(), OSError()])
def test_a_driver_without_graphs_is_said_once_and_it_runs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise error

    plain = quiet_run(**STILL)
    monkeypatch.setattr(SimulatedGraph, "__init__", none)
    with pytest.warns(trady.TradyWarning) as warned:
        result = run(None, **STILL, capture=True)
    once(warned, f"it cannot be recorded ({type(error).__name__}: {error})")
    assert losses(result) == losses(plain)


def test_a_gpu_that_is_full_while_it_records_is_said_once_and_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(SimulatedGraph, "record", full)
    with pytest.warns(trady.TradyWarning) as warned:
        run(None, **STILL, capture=True)
    once(warned, "it cannot be recorded (OutOfMemoryError: CUDA out of memory")


def test_updates_inside_the_backward_pass_are_said_once_and_run() -> None:
    with pytest.warns(trady.TradyWarning) as warned:
        run(None, **STILL, optimizer="sgd-in-backward", capture=True)
    once(warned, "its optimizer updates inside the backward pass")
    assert not SimulatedGraph.made


def test_nothing_is_read_on_the_host_while_a_pass_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are looked at in front of it, which a recorded pass cannot."""
    looked, recording = list[bool](), while_recording(monkeypatch)

    def check(labels: Tensor, classes: int) -> None:
        looked.append(bool(recording))
        check_labels(labels, classes)

    for module in ("batch", "step"):
        monkeypatch.setattr(f"trady.training.{module}.check_labels", check)
    quiet_run(**STILL, capture=True)
    assert len(looked) >= 18, "every batch is looked at"
    assert not any(looked)


def test_a_label_that_the_model_has_no_output_for_is_refused_in_front_of_a_replayed_pass() -> None:
    class Late(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.images, self.labels = small_data(48, 0).batch(range(48))

        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> Any:
            return self.images[index], int(self.labels[index]) if index < 40 else 7

    loader = torch.utils.data.DataLoader(Late(), 8)
    with pytest.raises(trady.DataError, match=r"labels run from \d to 7"):
        run(None, **STILL, data=(loader, small_data(24, 1)), capture=True)
    assert SimulatedGraph.made[0].replays == 5 - FIRST


# -- without CUDA ---------------------------------------------------------------------------------------------------


def test_on_the_cpu_there_is_nothing_to_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(trady.TrainingError, match="this run is on cpu, which has none: leave it out"):
        run(None, **STILL, capture=True)
    arguments = ["finetune", "tests.small_task:small_net", str(write_npz(tmp_path / "d.npz")), "--image-size", "12"]
    arguments += ["--budget", "1 MiB", "--out", str(tmp_path / "run"), "--capture"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "CUDA graphs" in refused.stderr


def test_plain_full_fine_tuning_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from trady.training.settings import refuse_capture

    with pytest.raises(trady.TrainingError, match="policy 'full' is plain PyTorch"):
        refuse_capture("full", torch.device("cuda"))
    refuse_capture("trady", torch.device("cuda"))
