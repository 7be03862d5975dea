"""``benchmarks.gpu`` on the CPU, in small: every part measures, writes as it goes, and says what is left out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import trady
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, language_models, memory, times
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.tables import as_table
from benchmarks.gpu.where import Where
from benchmarks.skipped import SkippedError
from tests.small_workloads import shown


def where(tmp_path: Path, *, seconds: float = 600) -> Where:
    return Where(torch.device("cpu"), small=True, deadline=time.time() + seconds, models=tmp_path)


def figures_of(part: str, item: str, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    command.attempt(part, item, where(tmp_path), file)
    figures: dict[str, Any] = json.loads(file.read_text())
    assert "error" not in figures, figures
    return figures


def test_gradients_are_the_plain_models(tmp_path: Path) -> None:
    figures = figures_of("gradients", "llama-tiny", tmp_path)
    assert list(figures) == list(correctness.VARIANTS)
    assert figures["float32"]["largest"] < 1e-5
    assert figures["float32, all recomputed"]["layers"] == figures["float32"]["layers"] > 0
    assert "llama-tiny" in shown(as_table("gradients", "", {"llama-tiny": figures}))


def test_peaks_are_those_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BUDGETS", 2)
    steps = figures_of("peaks", "vit-tiny", tmp_path)["steps"]
    assert len(steps) >= 2
    for step in steps:
        assert step["ledger"] <= step["budget"]
        assert step["predicted"] == pytest.approx(step["ledger"], rel=0.03)
        assert step["allocator"] is None


def test_trainings_that_are_compared_start_alike(tmp_path: Path) -> None:
    with pytest.warns(trady.TradyWarning, match="one CUDA device"):
        figures = figures_of("replays", "gpt2-small-like", tmp_path)
    assert figures["difference"] == figures["again"] == 0
    assert len(set(figures["losses"][0])) == len(figures["losses"][0]), "batches differ"


def test_times_are_taken_of_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "TIMED", ("full", "head", "trady-keep"))
    figures = figures_of("times", "vit-tiny", tmp_path)
    assert all(0 < figures[name]["host"] <= figures[name]["step"] for name in times.TIMED)
    assert "CUDA" in figures["trady-keep"]["captured"]["error"]
    assert "trady-keep" in shown(as_table("times", "", {"vit-tiny": figures}))


def test_language_models_take_what_their_methods_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: language_models.METHODS[name] for name in ("full", "trady, all recomputed")}
    monkeypatch.setattr(language_models, "METHODS", few)
    figures = figures_of("language", "1b-4x768", tmp_path)
    assert figures["trady, all recomputed"]["peak"] < figures["full"]["peak"]
    assert figures["full"]["tokens_a_second"] > 0


def test_nothing_begins_when_time_is_up(tmp_path: Path) -> None:
    asked = command.Asked("cpu", True, tmp_path, tmp_path)
    assert command.in_own_process("language", "1b-4x768", time.time() - 1, asked) == {"left_out": "time was up"}
    file = tmp_path / "x.json"
    command.attempt("peaks", "vit-tiny", where(tmp_path, seconds=-1), file)
    assert not file.exists()


@pytest.mark.parametrize("limit", [0, 9, 10, 70, 1234, 5000])
@pytest.mark.parametrize("crooked", [0, 3])
def test_the_largest_that_fits_is_found(limit: int, crooked: int, tmp_path: Path) -> None:
    tried: list[int] = []

    def peak(n: int) -> float:
        tried.append(n)
        return float("inf") if n > 800 else 5 + 4 * n + crooked * (n % 7)

    wanted = max((n for n in range(1, 801) if 5 + 4 * n + crooked * 6 <= limit), default=0)
    found = language_models.largest(peak, limit, where(tmp_path))
    assert wanted <= found <= wanted + 6
    assert not found or peak(found) <= limit
    assert len(tried) < 35


def test_an_attempt_that_fails_says_why_and_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(item: str, about: Where, write: Any) -> None:
        write({"first": 1})
        raise {"a": RuntimeError("no"), "b": SkippedError("nothing to see"), "c": trady.BudgetError("too small")}[item]

    monkeypatch.setitem(PARTS, "gradients", PARTS["gradients"].__class__("", ("a", "b", "c"), fails, 1.0, 1))
    for item, key, text in (("a", "error", "no"), ("b", "left_out", "nothing"), ("c", "error", "too small")):
        command.attempt("gradients", item, where(tmp_path), tmp_path / "x.json")
        figures = json.loads((tmp_path / "x.json").read_text())
        assert figures["first"] == 1
        assert text in figures[key]


def test_the_command_writes_what_its_processes_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--small", "--minutes", "5", "--part", "gradients", "--item", "gpt2-small-like"]
    assert command.run([*arguments, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"]["gradients"]["items"]["gpt2-small-like"]["float32"]["largest"] < 1e-5
    assert written["machine"]["torch"] == torch.__version__
    assert "gpt2-small-like" in capsys.readouterr().out


def test_backbones_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    command.attempt("gradients", "mbv2-w0.35", where(tmp_path), file)
    assert "is missing" in json.loads(file.read_text())["error"]


def test_patterns_tell_their_classes_apart() -> None:
    images, labels = correctness.patterns(40, 16, seed=1)
    assert images.shape == (40, 3, 16, 16)
    assert images.abs().max() <= 1
    assert set(labels.tolist()) <= set(range(10))
    assert not torch.equal(images, correctness.patterns(40, 16, seed=2)[0])


def test_no_time_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(trady.DataError, match="--minutes is 0"):
        command.run(["--device", "cpu", "--minutes", "0", "--out", str(tmp_path)])
