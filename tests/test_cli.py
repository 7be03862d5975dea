from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import trady
from tests.command import MODEL, start, trady_command, trady_here
from tests.small_task import write_npz

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ("demo", "plan", "fit", "finetune", "predict", "rank", "models", "measure", "compare", "study", "search")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "data.npz")


def finetune(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "finetune", MODEL, data, "--budget", "update:12 KiB", "--image-size", 12, "--batch-size", 8,
        "--out", out, *more,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_whose_options_exist(command: str) -> None:
    # Of the other commands a test runs the process.
    run = trady_command if command in ("demo", "search") else trady_here
    shown = run(command, "--help")
    assert shown.returncode == 0
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", shown.stdout)
    assert f"Example: trady {command} " in text
    assert "--json" in text
    example = text.split("Example: ")[1]
    for option in re.findall(r"--[a-z-]+", example):
        assert option in text.split("Example: ")[0]


def test_help_lists_the_commands() -> None:
    shown = trady_command("--help")
    assert all(command in shown.stdout for command in COMMANDS)
    assert trady_here("--version").stdout == f"trady {trady.__version__}\n"


def test_plan_prints_json_for_machines_and_a_table_for_people(tmp_path: Path) -> None:
    arguments = ("plan", MODEL, "--image-size", 12, "--budget", "elements:2000", "--classes", 3)
    shown = trady_command(*arguments, "--json", "--out", tmp_path / "plan.json")
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    assert plan["budget"] == "elements:2000"
    assert plan["cost"]["elements"] <= 2000
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    table = trady_here(*arguments)
    assert "features.3" in table.stdout


def test_finetune_prints_its_result_and_shows_progress_on_standard_error(data: Path, tmp_path: Path) -> None:
    shown = trady_command(*finetune(data, tmp_path / "run", "--epochs", 2, "--json"))
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["epochs"] == 2
    assert result["skipped"] == []
    for figure in ("epoch 2/2", "loss", "accuracy", "samples/s", "peak"):
        assert figure in shown.stderr
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["accuracy"] == result["accuracy"]


def test_finetune_on_parts_of_a_batch_writes_how_large_they_were(data: Path, tmp_path: Path) -> None:
    options = ("--epochs", 1, "--micro-batch", 3, "--recompute", "none", "--json")
    shown = trady_here(*finetune(data, tmp_path / "run", *options, "--fidelity", "8bit"))
    assert shown.returncode == 0, shown.stderr
    settings = json.loads((tmp_path / "run" / "result.json").read_text())["settings"]
    assert (settings["micro_batch"], settings["recompute"], settings["fidelity"]) == (3, "none", "8bit")
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["micro_batch"] == 3
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["micro_batch"], plan["fidelity"]) == (3, "8bit")
    message = refused(*finetune(data, tmp_path / "run", *options, "--resume"))
    assert "fidelity was '8bit', is now 'exact'" in message


def test_measure_accounts_for_a_step(tmp_path: Path) -> None:
    arguments = ("measure", MODEL, "--image-size", 12, "--batch-size", 8, "--classes", 3)
    full = json.loads(trady_command(*arguments, "--json").stdout)
    lean = json.loads(trady_here(*arguments, "--json", "--budget", "update:12 KiB").stdout)
    assert lean["saved_bytes"] < full["saved_bytes"]
    assert lean["inference_peak_bytes"] == full["inference_peak_bytes"]
    anew = json.loads(trady_here(*arguments, "--json", "--budget", "1 MiB", "--recompute", "all").stdout)
    assert anew["peak_bytes"] < full["peak_bytes"]
    smooth = ("measure", "tests.small_task:smooth_net", *arguments[2:], "--budget", "1 MiB", "--recompute", "none")
    exact, rounded = (json.loads(trady_here(*smooth, "--json", "--fidelity", f).stdout) for f in ("exact", "8bit"))
    assert rounded["saved_bytes"] < exact["saved_bytes"]
    assert "inference" in trady_here(*arguments, "--out", tmp_path / "ledger.json").stdout
    assert json.loads((tmp_path / "ledger.json").read_text())["peak_bytes"] == full["peak_bytes"]


@pytest.mark.skipif(not hasattr(trady, "rank"), reason="trady.rank is not there yet")
def test_rank_writes_a_ranking_that_plan_takes(data: Path, tmp_path: Path) -> None:
    ranking = tmp_path / "ranking.json"
    shown = trady_command("rank", MODEL, data, "--image-size", 12, "--batch-size", 8, "--batches", 2, "--out", ranking)
    assert shown.returncode == 0, shown.stderr
    assert "features.3" in shown.stdout
    plan = trady_here(
        "plan", MODEL, "--image-size", 12, "--budget", "elements:2000", "--classes", 3, "--json",
        "--ranking", ranking,
    )  # fmt: skip
    assert json.loads(plan.stdout)["ranking"] == "measured"


def refused(*arguments: object, run: Run = trady_here) -> str:
    shown = run(*arguments)
    assert shown.returncode == 2, shown.stderr
    assert shown.stdout == ""
    assert "Traceback" not in shown.stderr
    *said, error = shown.stderr.splitlines()  # what was found in the data is said before
    assert error.startswith("error: ")
    assert not [line for line in said if line.startswith(("error", "warning"))]
    return error


def test_errors_are_one_message_and_exit_code_2(data: Path, tmp_path: Path) -> None:
    plan = ("plan", MODEL, "--image-size", 12)
    assert "300 MiB" in refused(*plan, "--budget", "many", run=trady_command)
    assert "below the minimum" in refused(*plan, "--budget", "elements:1")
    assert "did you mean 'dynamic-random'" in refused(*plan, "--budget", "1 MiB", "--policy", "dynamic-randon")
    assert "no function" in refused("plan", "tests.small_task:none", "--budget", "1 MiB")
    out = tmp_path / "run"
    assert "does not exist" in refused(*finetune(tmp_path / "none.npz", out), run=trady_command)
    assert not out.exists()
    (out / "checkpoint").mkdir(parents=True)
    assert "--resume" in refused(*finetune(data, out))
    assert "cannot read the checkpoint" in refused(*finetune(data, out, "--resume"))
    assert "auto, all, none" in refused(*finetune(data, tmp_path / "new", "--recompute", "much"))
    assert "exact, 8bit, 4bit" in refused(*plan, "--budget", "1 MiB", "--fidelity", "few")
    assert "exact, 8bit, 4bit" in refused(*finetune(data, tmp_path / "new", "--fidelity", "few"))
    assert "belong to --budget" in refused("measure", MODEL, "--image-size", 12, "--fidelity", "8bit")
    assert "nor auto" in refused(*finetune(data, tmp_path / "new", "--micro-batch", "0"))
    in_backward = ("--optimizer", "sgd-in-backward", "--micro-batch", "auto")
    assert "take sgd" in refused(*finetune(data, tmp_path / "new", *in_backward))


def test_a_limit_that_is_none_is_refused_before_any_data_is_read(tmp_path: Path) -> None:
    refused = trady_here(*finetune(tmp_path / "nowhere.npz", tmp_path / "run", "--channel-clip", "most"))
    assert refused.returncode == 2
    assert "'most' is neither a number nor auto" in re.sub(r"[│\s]+", " ", refused.stderr)
    assert "nowhere" not in refused.stderr


def test_debug_shows_where_an_error_came_from() -> None:
    shown = trady_command("plan", MODEL, "--budget", "many", "--debug")
    assert shown.returncode == 2
    assert "Traceback" in shown.stderr
    assert "parse_budget" in shown.stderr


def test_unreadable_images_are_refused_or_skipped_by_option(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label in ("a", "b", "c"):
            place = tmp_path / "photos" / part / label
            place.mkdir(parents=True)
            for index in range(4):
                image.new("RGB", (12, 12), (index, 90, 9)).save(place / f"{index}.png")
    (tmp_path / "photos/train/b/2.png").write_bytes(b"\x89PNG")
    assert "b/2.png" in refused(*finetune(tmp_path / "photos", tmp_path / "run"))
    shown = trady_here(
        *finetune(tmp_path / "photos", tmp_path / "run", "--epochs", 1, "--json", "--on-unreadable", "skip")
    )
    assert shown.returncode == 0, shown.stderr
    assert "skipped 1 unreadable image: " in shown.stderr
    assert [Path(path).name for path in json.loads(shown.stdout)["skipped"]] == ["2.png"]


def test_ctrl_c_keeps_the_checkpoint_and_exits_with_130(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*finetune(data, out, "--epochs", 500))
    while not (out / "checkpoint").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"the last checkpoint is kept in {out / 'checkpoint'}: go on with --resume" in err
    assert (out / "checkpoint" / "checkpoint.json").exists()
    assert not list(out.glob("*.tmp-*"))
