"""The commands of the benchmarks measure what they say: on networks small enough to know the answer."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import trady
from benchmarks import (
    backbones,
    limits,
    memory,
    options,
    overhead,
    peers,
    recurrent,
    sparsity,
    speed,
    text,
)
from benchmarks.architectures import __main__ as architectures
from benchmarks.architectures.attempt import MOST_GRADIENT_ERROR, Result
from benchmarks.picture import apart
from benchmarks.tasks import CrossEntropy
from benchmarks.workloads import laid_out
from tests.small_workloads import TOY, small, toy_task
from trady.model.batch import Batch


def test_steps_take_turns_and_warm_up_rounds_do_not_count() -> None:
    ran: list[str] = []
    ticks = itertools.count()
    steps = {name: lambda name=name: ran.append(name) for name in ("a", "b", "c")}
    seconds = speed.in_turns(steps, 3, clock=lambda: next(ticks))
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1]}
    counted = ran[-9:]
    assert len(ran) == 3 * (3 + speed.WARM_UP_ROUNDS)
    assert [counted[i : i + 3] for i in (0, 3, 6)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_ratio_is_taken_round_by_round() -> None:
    seconds = {"trady": [1.0, 20.0, 3.0], "full": [2.0, 40.0, 1.0]}
    assert speed.ratio(seconds, "trady", "full") == 0.5


def test_speed_command_reports_every_method_and_gates_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bars = replace(TOY.bars, step_over_full=1e-9, step_over_floor=1e9)
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": replace(TOY, bars=bars)})
    target = tmp_path / "speed.json"
    assert speed.run(["--workload", "toy", "--repeats", "2", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert {method: len(times) for method, times in figures["seconds"].items()} == {
        method: 2 for method in speed.TIMED if method != "trady-keep"
    }
    assert {over: aim["met"] for over, aim in figures["aims"].items()} == {"full": False, "floor": True}
    assert set(figures["trady_over"]) == {"full", "floor"}


def test_both_layouts_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": TOY})
    assert speed.run(["--repeats", "1", "--method", "head", "--channels-last"]) == 0
    assert "channels_last" in capsys.readouterr().out


def test_overhead_is_a_plan_and_a_draw_over_the_steps_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert overhead.steps_of_an_epoch(torch.zeros(32, 3, 8, 8)) == 1563
    ids = torch.zeros(8, 256, dtype=torch.long)
    assert overhead.steps_of_an_epoch({"input_ids": ids}) == 8419
    assert overhead.steps_of_an_epoch({"input_ids": ids, "labels": ids}) == 1020
    assert overhead.Overhead(3.0, 1.0, 0.5, 100).share == 0.08
    monkeypatch.setattr(overhead, "WORKLOADS", {"toy": TOY})
    target = tmp_path / "overhead.json"
    assert overhead.run(["--repeats", "1", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert min(figures[name] for name in ("plan_seconds", "draw_seconds", "step_seconds", "share")) > 0


def test_speed_of_steps_that_stop_early_is_predicted_and_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": replace(TOY, budget="elements:20000")})
    target = tmp_path / "speed.json"
    asked = ["--repeats", "1", "--max-step-flops", "1", "0.5", "0.1", "--json", str(target)]
    assert speed.run(asked) == 0
    found = json.loads(target.read_text())["workloads"]["toy"]
    assert found["0.5x"]["predicted"] <= 0.5 < found["1x"]["predicted"] <= 1
    assert found["0.5x"]["passed"] < found["1x"]["passed"]
    assert all(len(found[limit]["seconds"]) == 1 and found[limit]["measured"] > 0 for limit in ("1x", "0.5x"))
    assert "below the minimum" in found["0.1x"]["refused"]


def test_speed_of_one_method_alone_has_no_aims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": TOY})
    target = tmp_path / "speed.json"
    assert speed.run(["--repeats", "1", "--method", "head", "galore", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert figures["aims"] == {}
    assert list(figures["skipped"]) == ["galore"]


def test_peers_command_writes_table_json_and_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "WORKLOADS", {"toy": TOY})
    methods = ("full", "head", "bitfit", "checkpoint", "galore", "static-random", "trady")
    target = tmp_path / "out"
    given = ["--workload", "toy", "--method", *methods, "--repeats", "1", "--draws", "1", "--out", str(target)]
    assert peers.run(given) == 0
    figures = json.loads((target / "peers.json").read_text())
    toy = figures["workloads"]["toy"]
    assert list(toy["skipped"]) == ["galore"]
    assert [entry["method"] for entry in toy["rows"]] == [method for method in methods if method != "galore"]
    for entry in toy["rows"]:
        assert entry["floor_seconds"] > 0
        assert entry["step_seconds"] > 0
        assert min(entry[key] for key in ("saved_bytes", "peak_bytes", "inference_peak_bytes")) > 0
        assert entry["trainable_parameters"] > 0
    assert (target / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (target / "toy.svg").read_text(encoding="utf-8")
    assert "BitFit" in capsys.readouterr().out


def test_labels_of_a_picture_keep_their_order_and_distance() -> None:
    moved = apart([5.0, 1.0, 1.5, 5.1], 1.0)
    assert moved == [5.0, 1.0, 2.0, 6.0]


def test_sparsity_of_a_draw_is_the_plans_and_its_bytes_are_the_ledgers() -> None:
    drawn = list(sparsity.draws(TOY, Path(), range(3)))
    assert [draw.seed for draw in drawn] == [0, 1, 2]
    assert all(draw.planned_channel_bytes == draw.measured_channel_bytes > 0 for draw in drawn)
    plan = trady.plan(toy_task().model, toy_task().batch, budget=TOY.budget, seed=2)
    assert drawn[2].activation_sparsity == plan.mean_sparsity.activation
    assert drawn[2].first_draw[1] == plan.cost.activation_sparsity
    assert plan.mean_sparsity.draws == 20
    assert drawn[2].channels == plan.cost.channels


def test_sparsity_faults_name_seed_and_figure() -> None:
    good = sparsity.Draw("all layers", 2, 0, 9, 0.95, 0.98, 0.97, (0.9, 0.9, 0.9), 64, 64, 0.97)
    assert sparsity.faults([good]) == []
    found = sparsity.faults(
        [good, replace(good, seed=4, flops_reduction=0.94), replace(good, measured_channel_bytes=68)]
    )
    assert len(found) == 2
    assert "seed 4: flops_reduction 0.9400" in found[0]
    assert "68 bytes, planned 64" in found[1]


@pytest.mark.parametrize(("most", "fitting"), [(64, n) for n in range(66)] + [(5, 3), (1, 0), (1, 1)])
def test_the_largest_that_fits_is_found_by_halving(most: int, fitting: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= fitting

    assert limits.largest(fits, most) == min(fitting, most)
    assert len(asked) == len(set(asked)) <= 15


def test_limits_are_the_largest_batch_and_length_whose_step_stays_below(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    small = partial(text.llama, layers=1, width=32, intermediate=48, vocabulary=60)
    monkeypatch.setitem(limits.MODELS, "llama-tiny", (small, "200 KiB", 8))
    measured: dict[tuple[int, int], int] = {}
    peak_of = limits.peak_of

    def noted(*step: Any) -> int:
        peak = peak_of(*step)
        assert peak is not None
        measured[tuple(step[2].batch["input_ids"].shape)] = peak
        return peak

    monkeypatch.setattr(limits, "peak_of", noted)
    target = tmp_path / "limits.json"
    batches = []
    for method in ("full", "trady"):
        measured.clear()
        assert limits.run(["--batch", "3", "--length", "16", "--method", method, "--json", str(target)]) == 0
        found = json.loads(target.read_text(encoding="utf-8"))
        assert found["limit_bytes"] == 200 * 2**10
        (entry,) = found["limits"]
        assert entry["method"] == method
        assert measured[entry["batch"], 16] <= found["limit_bytes"] < measured[entry["batch"] + 1, 16]
        assert measured[3, entry["length"]] <= found["limit_bytes"] < measured[3, entry["length"] + 8]
        batches.append(entry["batch"])
    assert batches[0] < batches[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--limit", "elements:300"], "whole step"),
        (["--limit", "update:1 MiB"], "whole step"),
        (["--length", "0"], "at least 1"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_limits_refuse_what_they_cannot_search(options: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(trady.errors.TradyError, match=told):
        limits.run(options)


@pytest.mark.parametrize("command", [memory, speed, peers])
def test_a_device_that_is_not_there_is_refused(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(trady.ModelError, match=r"no CUDA device.*--device cpu"):
        command.run(["--device", "cuda"])


@pytest.mark.parametrize("command", [speed, peers])
def test_processor_time_of_a_gpu_is_refused(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(trady.TradyError, match="--clock wall"):
        command.run(["--device", "cuda", "--clock", "cpu"])


def test_clock_of_a_gpu_waits_for_it_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("waited"))

    def read() -> float:
        happened.append("read")
        return 0.0

    monkeypatch.setattr(time, "perf_counter", read)
    asked = argparse.Namespace(repeats=1, threads=None, clock="wall")
    _, clock = speed.timing(asked, torch.device("cuda"))
    speed.in_turns({"step": lambda: happened.append("ran")}, 1, clock)
    assert happened[-5:] == ["waited", "read", "ran", "waited", "read"]


@pytest.mark.parametrize("name", ["resnet50", "minilm", "gpt2-small-like"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_model_batch_and_labels_are_on_the_device(name: str, channels_last: bool) -> None:
    meta = torch.device("meta")
    task = laid_out(small(name), channels_last=channels_last, device=meta).make(Path())
    assert {tensor.device for tensor in (*task.model.state_dict().values(), *Batch.of(task.batch).tensors)} == {meta}
    if name == "gpt2-small-like":  # it looks at its ids
        assert task.batch["labels"] is task.batch["input_ids"], "as on the CPU, they are counted once"
    else:
        assert task.run().device == meta
        assert isinstance(task.loss, CrossEntropy)
        assert task.loss.labels.device == meta


def test_figures_name_the_gpu_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.machine()["gpu"] is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert options.machine()["gpu"] == "some GPU"


def test_architectures_are_tried_each_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "architectures.json"
    names = ["resnet", "ibert"]  # the second one looks at the values of activations
    assert architectures.run(["--architecture", *names, "--json", str(target)]) == 0
    found = [Result(**each) for each in json.loads(target.read_text())["architectures"]]
    assert [(each.architecture, each.kind, each.layers) for each in found] == [
        ("resnet", "trains", 16),
        ("ibert", "trains", 13),
    ]
    assert all(each.gradient_error < MOST_GRADIENT_ERROR for each in found)
    assert all(-0.2 < each.over_budget <= 0 for each in found)
    monkeypatch.setattr(architectures, "PATIENCE", 0.01)
    assert architectures.run(["--architecture", "resnet"]) == 1
    assert "not done after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, True),
        ({"gradient_error": 1e-3}, False),
        ({"gradient_error": float("inf")}, False),
        ({"prediction_error": -0.04}, False),
        ({"over_budget": 1e-6}, False),
        ({"kind": "refused"}, True),
        ({"kind": "failed"}, False),
    ],
)
def test_an_architecture_with_a_wrong_gradient_is_a_miss(changed: dict[str, Any], met: bool) -> None:
    assert Result(**{"architecture": "any", "kind": "trains", "layers": 3, **changed}).met == met


@pytest.mark.parametrize("command", [memory, speed, peers, sparsity, backbones, overhead, limits, architectures])
def test_commands_explain_themselves(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.run(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert command.__name__.removesuffix(".__main__") in told
    assert ("--models" in told) == (command not in (limits, architectures)), "it needs no files"


def test_command_is_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(options.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_recurrent_layers_are_timed_beside_full_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "recurrent.json"
    assert recurrent.run(["--steps", "6", "--features", "8", "--repeats", "1", "--json", str(target)]) == 0
    layers = json.loads(target.read_text())["layers"]
    assert list(layers) == ["lstm, 6 x 8", "gru, 6 x 8"]
    assert all(0 < row["peak_bytes"] < row["full_peak_bytes"] and row["over_full"] > 0 for row in layers.values())
    assert "step ÷ full" in capsys.readouterr().out
