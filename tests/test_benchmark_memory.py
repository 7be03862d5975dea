"""The benchmark of memory measures what it says, and holds it against its bars."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import memory, text
from benchmarks.methods import PEERS
from benchmarks.workloads import MIB, TRANSFORMER, Bars
from tests.small_workloads import TOY, row, shown, toy_task


def test_inference_peak_without_labels_has_no_loss() -> None:
    task = text.llama(2, 8, layers=1, width=64, intermediate=96, vocabulary=5000)
    scores = 4 * 2 * 8 * 5000
    with_loss, without = memory.inference_peak(task), memory.inference_peak(task, labels=False)
    assert without >= scores
    assert with_loss >= without + scores // 2
    assert "labels" in task.batch


def test_memory_of_a_toy_workload_is_what_its_layers_keep() -> None:
    measured = memory.measure(TOY, Path(), draws=2, methods=("full", "head", "static-random", "trady"))
    rows = {(row.method, row.seed): row for row in measured.rows}
    assert set(rows) == {(m, 0) for m in ("full", "head")} | {
        (m, seed) for m in ("static-random", "trady") for seed in (0, 1)
    }
    assert measured.scores_peak_bytes is None
    assert len({row.inference_peak_bytes for row in rows.values()}) == 1
    full, head, drawn = rows["full", 0], rows["head", 0], rows["trady", 0]
    # Full fine-tuning keeps at least the input of both convolutions and of both normalisations.
    maps = 4 * 8 * 32 * 32 * (3 + 8 + 8) + 4 * 8 * 16 * 16 * 16
    assert full.saved_bytes > maps
    assert head.saved_bytes < full.saved_bytes / 100
    assert 0 < drawn.channel_bytes <= drawn.saved_bytes < full.saved_bytes / 3
    assert drawn.peak_bytes < full.peak_bytes
    assert drawn.ratio == drawn.peak_bytes / drawn.inference_peak_bytes
    assert head.trainable_parameters < drawn.trainable_parameters < full.trainable_parameters


def test_inference_peak_is_that_of_the_tuners_own_ledger() -> None:
    task = toy_task()
    tuner = TOY.arm(task)
    ledger = tuner.ledger(lambda: task.run().backward())
    tuner.finish()
    assert memory.inference_peak(toy_task()) == ledger.inference_working_peak_bytes


def test_bars_are_held_against_the_worst_draw() -> None:
    workload = replace(TOY, bars=Bars(1.0, 40 * MIB))
    good, high, fat = (
        row("trady", 40 * MIB, 100 * MIB),
        row("trady", 1, 100 * MIB + 1, seed=1),
        row("trady", 40 * MIB + 1, 1, seed=2),
    )
    full = row("full", 999 * MIB, 999 * MIB)
    assert [v.met for v in memory.judge(workload, [full, good])] == [True, True]
    assert [v.met for v in memory.judge(workload, [full, high, good])] == [False, True]
    assert [v.met for v in memory.judge(workload, [full, good, fat])] == [True, False]


def test_transformers_bars_are_the_peak_every_peer_and_the_gradient() -> None:
    workload = replace(TOY, bars=TRANSFORMER)
    ours = replace(row("trady", 1, 150 * MIB), gradient_error=1e-6)
    others = [row(method, 1, 151 * MIB) for method in PEERS] + [row("head", 1, 1), row("static-random", 1, 150 * MIB)]
    assert [v.met for v in memory.judge(workload, [ours, *others])] == [True, True, True]
    for faulty, verdicts in (
        (replace(ours, peak_bytes=201 * MIB), [False, False, True]),
        (replace(ours, peak_bytes=151 * MIB), [True, False, True]),
        (replace(ours, gradient_error=2e-4), [True, True, False]),
    ):
        assert [v.met for v in memory.judge(workload, [faulty, *others])] == verdicts
    assert "aim 1.6" in memory.judge(workload, [ours])[0].bar
    assert memory.judge(workload, others) == []


@pytest.mark.parametrize(("bar", "code"), [(100.0, 0), (1e-3, 1)])
def test_memory_command_exits_1_when_a_bar_is_missed(
    bar: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "WORKLOADS", {"toy": replace(TOY, bars=Bars(bar))})
    target = tmp_path / "memory.json"
    methods = ["--method", "full", "head", "trady"]
    assert memory.run(["--workload", "toy", "--draws", "1", *methods, "--json", str(target)]) == code
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert [entry["method"] for entry in figures["workloads"]["toy"]["rows"]] == ["full", "head", "trady"]
    assert [entry["met"] for entry in figures["workloads"]["toy"]["bars"]] == [code == 0]
    assert ("FAIL" in capsys.readouterr().out) is bool(code)


def test_peak_of_the_allocator_stands_beside_the_exact_one_where_there_is_one() -> None:
    on_cpu = row("head", MIB, 2 * MIB)
    on_cuda = replace(on_cpu, allocator_peak_bytes=3 * MIB)
    assert "allocator" not in shown(memory.as_table(TOY, [on_cpu]))
    table = shown(memory.as_table(TOY, [on_cuda]))
    assert "allocator peak" in table
    assert "3.0 MiB" in table
    measured = memory.Measured((on_cuda,), {})
    assert memory.as_json(measured, [])["rows"][0]["allocator_peak_bytes"] == 3 * MIB
