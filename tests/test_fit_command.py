"""``trady fit``: what it shows, draws and writes, models without weights, what it refuses, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fit import llama as shape
from tests.command import MODEL, trady_command, trady_here
from tests.fits import CONFIG, installed
from trady.cli.commands import fit as command
from trady.estimates import fit as estimates
from trady.estimates.estimator import Estimator
from trady.estimates.methods import METHODS
from trady.estimates.report import FitReport

SIZE = ("--batch-size", 4, "--length", 32)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A configuration, and no weights."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def figures(*arguments: object) -> Any:
    result = trady_here("fit", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = trady_here("fit", *arguments)
    assert result.returncode == 2, result.stdout
    assert result.stdout == ""
    return result.stderr


def test_a_table_of_a_configuration(llama: Path) -> None:
    result = trady_command("fit", llama, *SIZE, "--methods", "full,bitfit,trady", "--memory", "3 MiB")
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    for word in (
        "4 × 32 tokens",
        "full fine-tuning",
        "TraDy, smallest budget",
        "TraDy in 3 MiB",
        "in 3.0 MiB",
        "longest",
    ):
        assert word in text
    assert "BitFit is left out: the network has no bias" in text
    assert "a wider terminal" in text


def test_json_is_the_report(llama: Path, tmp_path: Path) -> None:
    found = figures(llama, *SIZE, "--methods", "full", "--memory", "16MiB", "--out", tmp_path / "fit.json")
    assert (found["format"], found["version"]) == ("trady fit", 1)
    assert FitReport.from_json(found).complete
    assert json.loads((tmp_path / "fit.json").read_text()) == found
    (row,) = found["rows"]
    assert row["fits"] is True
    assert row["largest_batch"] > 4
    assert row["longest_sequence"] == 64  # as many as the configuration has positions for
    assert sum(row["parts"].values()) == row["peak_bytes"]


def test_a_configuration_says_how_long_and_images_how_large(llama: Path) -> None:
    assert figures(llama, "--methods", "full")["length"] == 64
    found = figures(MODEL, "--image-size", 16, "--batch-size", 2, "--methods", "full,head", "--dtype", "bfloat16")
    assert (found["length"], found["image_size"], found["dtype"]) == (None, 16, "bfloat16")


def test_targets_and_rank_are_those_of_the_adapters(llama: Path) -> None:
    installed("lora")
    found = figures(llama, *SIZE, "--methods", "lora", "--targets", "q_proj,v_proj", "--rank", 2)
    assert found["rows"][0]["trainable_parameters"] == 2 * 2 * (2 * (64 + 64))
    own = figures(llama, *SIZE, "--methods", "lora", "--targets", "peft", "--rank", 2)
    assert own["rows"][0]["peak_bytes"] == found["rows"][0]["peak_bytes"]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture(llama: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"fit.{ending}"
    figures(llama, *SIZE, "--methods", "full,checkpoint", "--memory", "3MiB", "--plot", picture)
    assert picture.stat().st_size > 2000
    if ending == "svg":
        text = picture.read_text()
        assert "full fine-tuning" in text
        assert "3.0 MiB" in text


def test_what_cannot_be_is_refused(llama: Path, tmp_path: Path) -> None:
    assert "no method 'most'; there are full" in refused(llama, "--methods", "most")
    assert "type one of .svg" in refused(llama, "--plot", tmp_path / "fit.gif")
    assert "takes at most 64 tokens" in refused(llama, "--length", 65)
    assert "--dtype 'int3' is not known; there are float32" in refused(llama, "--dtype", "int3")
    assert "cannot be read" in refused(llama, "--memory", "lots")
    assert "no function 'nothing'" in refused("tests.small_task:nothing")


def test_an_interrupt_leaves_what_is_known(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Estimator.row

    def until(self: Estimator, method: Any, at: Any) -> Any:
        if method.name == "checkpoint":
            raise KeyboardInterrupt
        return measure(self, method, at)

    monkeypatch.setattr(Estimator, "row", until)
    result = trady_here("fit", llama, *SIZE, "--methods", "full,checkpoint,trady")
    assert result.returncode == 130
    assert "full fine-tuning" in result.stdout
    assert "methods are missing" in result.stdout
    assert "stopped: 1 of 3 methods" in result.stderr


def test_help_names_what_there_is() -> None:
    known = {*METHODS, "last-N", "trady"}
    assert set(command.METHODS.split(", ")) == known
    assert ",".join(estimates.USUAL) == command.USUAL
    assert ", ".join(estimates.OPTIMIZERS) == command.OPTIMIZERS
    shown = trady_here("fit", "--help").stdout
    assert "llama/config.json" in shown


def test_the_shape_of_a_llama_of_three_billion_parameters_is_that_which_peft_counts(tmp_path: Path) -> None:
    installed("lora")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**shape.CONFIG, "num_hidden_layers": 2}))
    found = figures(path, *SIZE, "--methods", "full,lora", "--targets", "peft", "--rank", 32, "--dtype", "bfloat16")
    full, lora = found["rows"]
    layers = 2 / shape.CONFIG["num_hidden_layers"]  # type: ignore[operator]
    assert lora["trainable_parameters"] == shape.PUBLISHED["lora"]["trainable"] * layers
    embedding = 128256 * 3072
    assert full["trainable_parameters"] - embedding - 3072 == pytest.approx(
        (shape.PUBLISHED["full"]["trainable"] - embedding - 3072) * layers
    )
