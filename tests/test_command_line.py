"""What a person meets first: help and typos without waiting, options in files, budgets that are found, messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.command import MODEL, trady_command, trady_here
from tests.small_task import write_npz
from trady.cli import choices, options, texts
from trady.cli.messages import Messages
from trady.cli.wording import as_typed
from trady.errors import BudgetError, DataError, ModelError, RankingError, TradyWarning
from trady.optim.clipping import AUTO as CLIP_AUTO
from trady.planning.budget import Budget
from trady.training.data.augment import AUGMENTATIONS
from trady.training.models.from_config import DTYPES
from trady.training.models.source import known_names
from trady.training.optimizers import NAMES
from trady.training.texts import columns, load

QUICK = ("--image-size", 12, "--batch-size", 8, "--epochs", 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "data.npz")


def refused(*arguments: object) -> str:
    shown = trady_here(*arguments)
    assert shown.returncode == 2, shown.stderr
    assert shown.stderr.startswith("error: ")
    return shown.stderr


# -- before PyTorch is loaded


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["finetune", "--help"],
        ["plan", "--help"],
        ["--version"],
        ["models"],
        ["finetune", "efficientnet-lit0", "fashion-mnist"],
        ["finetune", "efficientnet-lite0", "fashion-mnst"],
        ["finetune", "efficientnet-lite0", "fashion-mnist", "--optimizer", "adamv"],
        ["finetune", "efficientnet-lite0", "fashion-mnist", "--policy", "tradi"],
        ["plan", "efficientnet-lite0", "--ranking", "onlin"],
    ],
)
def test_help_and_typos_are_answered_without_pytorch(words: list[str]) -> None:
    code = (
        "import sys\nfrom trady.cli.app import app\n"
        f"try:\n    app({words!r}, prog_name='trady')\nexcept SystemExit as end:\n    code = end.code\n"
        "assert 'torch' not in sys.modules, 'PyTorch was loaded'\nprint('code', code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    helped = words[-1] in ("--help", "--version", "models")
    assert done.stdout.endswith(f"code {0 if helped else 2}\n")
    assert helped or re.match(r"error: .*did you mean '", done.stderr)


def test_the_words_of_the_command_line_are_those_of_the_library() -> None:
    assert options.OPTIMIZERS == NAMES
    assert tuple(AUGMENTATIONS) == options.AUGMENTATIONS
    assert tuple(DTYPES) == options.DTYPES
    assert known_names() == choices.MODELS
    assert CLIP_AUTO == "auto"
    assert texts.TASKS == columns.TASKS
    assert texts.OVERFLOWS == load.OVERFLOWS


def test_names_of_the_package_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, trady\nassert 'torch' not in sys.modules\nassert 'prepare' in dir(trady)\n"
        "assert callable(trady.prepare) and trady.optim.SGD and trady.Tuner\n"
        "from trady import *\nassert finetune is trady.finetune\n"
        "try:\n    trady.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "module 'trady' has no attribute 'nothing'\n"


# -- typos and completion


def test_a_typo_of_a_model_or_of_a_folder_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    with pytest.raises(ModelError, match="did you mean 'efficientnet-lite0'"):
        choices.check_model("EfficientNet-Lite1")
    with pytest.raises(ModelError, match="did you mean 'photographs'"):
        choices.check_model("photograps")
    with pytest.raises(ModelError, match="does not exist"):
        choices.check_model("models/llama/config.json")
    with pytest.raises(DataError, match="did you mean 'fashion-mnist'"):
        choices.check_dataset("fashon-mnist")
    with pytest.raises(DataError, match="did you mean 'photographs'"):
        choices.check_dataset("fotographs/")
    with pytest.raises(RankingError, match="did you mean 'structural'"):
        choices.check_ranking("structual")
    for model in ("google/vit-base-patch16-224", "bert-base-uncased", "my.module:net", "photographs", None):
        assert choices.check_model(model) == model
    for dataset in ("Fashion_MNIST", "photographs", "stanfordnlp/sst2", "new.npz"):
        assert choices.check_dataset(dataset) == dataset


@pytest.mark.parametrize(
    ("option", "typed", "meant"),
    [
        ("--optimizer", "addamw", "adamw"),
        ("--policy", "dynamic-randon", "dynamic-random"),
        ("--augment", "pape", "paper"),
        ("--recompute", "al", "all"),
        ("--mode", "evl", "eval"),
        ("--mixed-precision", "bf61", "bf16"),
        ("--on-unreadable", "skipp", "skip"),
    ],
)
def test_a_word_that_is_not_known_is_refused_with_the_nearest_and_all(
    data: Path, tmp_path: Path, option: str, typed: str, meant: str
) -> None:
    message = refused("finetune", MODEL, data, "--out", tmp_path / "run", option, typed)
    assert message.startswith(f"error: {option} {typed!r} is not known; did you mean {meant!r}? there are ")
    assert not (tmp_path / "run").exists()


def test_values_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "flowers.npz")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("")
    assert choices.complete_dataset("f") == ["fashion-mnist", "flowers.npz"]
    assert choices.complete_dataset("n") == []
    assert choices.complete_model("r") == ["runs/"]
    assert choices.complete_model("runs/") == ["runs/first/"]
    assert choices.complete_model("eff") == ["efficientnet-lite0"]
    assert choices.complete_model("nowhere/x") == []
    assert choices.complete_ranking("o") == ["online"]
    assert choices.completing(options.POLICIES)("dynamic-r") == ["dynamic-random", "dynamic-rgn"]


def test_a_shell_completes_the_values_of_an_option() -> None:
    line = "trady finetune efficientnet-lite0 fashion-mnist --optimizer adamw-"
    code = "from trady.cli.app import app; app(prog_name='trady')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"_TRADY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "5", "PATH": "/usr/bin"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.stdout.split() == ["adamw-in-backward"], found.stderr


def test_the_catalogue_names_models_of_every_source() -> None:
    entries = json.loads(trady_here("models", "--json").stdout)
    assert {entry["kind"] for entry in entries} == {
        "built-in", "run", "transformers", "timm", "torchvision", "function",
    }  # fmt: skip
    assert [entry["name"] for entry in entries if entry["kind"] == "built-in"] == list(known_names())
    assert "google/vit-base-patch16-224" in trady_here("models", "transformers").stdout
    assert "did you mean 'transformers'" in refused("models", "transformer")


# -- budgets


def test_without_a_budget_a_run_takes_what_an_inference_pass_does(data: Path, tmp_path: Path) -> None:
    arguments = ("--image-size", 12, "--batch-size", 8, "--classes", 3)
    inference = json.loads(trady_here("measure", MODEL, *arguments, "--json").stdout)["inference_peak_bytes"]
    planned = json.loads(trady_here("plan", MODEL, *arguments, "--json").stdout)
    found = planned["predicted_peak_bytes"], planned["budget"]
    shown = trady_here("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["budget"] == found[1]
    budget = options.read_budget(described["budget"])
    assert isinstance(budget, Budget)
    # A network this small needs more to train at all.
    assert budget.amount >= inference
    assert found[0] <= budget.amount
    assert f"in {described['budget']}, what an inference pass takes" in shown.stderr
    again = trady_here("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run", "--resume")
    assert again.returncode == 0, again.stderr
    longer = trady_here(
        "finetune", MODEL, data, *QUICK[:-1], 2, "--out", tmp_path / "run", "--resume", "--budget", "auto"
    )
    assert longer.returncode == 0, longer.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["budget"] == described["budget"]


def test_a_share_of_what_is_free_is_a_budget(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.process.free.free_memory", lambda: (10 << 20, "this machine"))
    assert options.read_budget("80%") == Budget("peak", 8 << 20)  # type: ignore[arg-type]
    assert options.read_budget("100 %") == Budget("peak", 10 << 20)  # type: ignore[arg-type]
    for wrong in ("0%", "120%", "much%"):
        with pytest.raises(BudgetError, match=r"type e\.g\. --budget 80%"):
            options.read_budget(wrong)
    with pytest.raises(BudgetError, match=r"less than 1 MiB: this machine has 10\.0 MiB free"):
        options.read_budget("1%")
    run = ("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run", "--budget", "80%")
    assert trady_here(*run).returncode == 0
    monkeypatch.setattr("trady.process.free.free_memory", lambda: (20 << 20, "this machine"))
    resumed = trady_here(*run, "--resume")  # with the budget that it began with
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["budget"] == "peak:8 MiB"
    monkeypatch.setattr("trady.process.free.free_memory", lambda: (None, ""))
    with pytest.raises(BudgetError, match="does not say what memory is free"):
        options.read_budget("80%")


def test_full_fine_tuning_takes_no_budget(data: Path, tmp_path: Path) -> None:
    run = ("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run", "--policy", "full")
    message = refused(*run, "--budget", "1 MiB")
    assert "which keeps to no budget: leave --budget out, or take --policy trady" in message
    assert trady_here(*run).returncode == 0
    config = tmp_path / "run" / "run.toml"
    assert trady_here("finetune", "--config", config, "--out", tmp_path / "again").returncode == 0


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ('it is 3 MiB: type budget="peak:3 MiB". Less', 'it is 3 MiB: type --budget "peak:3 MiB". Less'),
        ("go on by --resume (resume=True), or", "go on by --resume, or"),
        ("with --epochs 3 --resume (epochs=3, resume=True), then", "with --epochs 3 --resume, then"),
        ("try --lr 0.02 (lr=0.02). If", "try --lr 0.02. If"),
        ("leave --lr (lr=) out", "leave --lr out"),
        ('19 MiB with micro_batch="auto" or recompute="all"', "19 MiB with --micro-batch auto or --recompute all"),
        ("warmup_epochs is 7; it must be less than 5", "--warmup-epochs is 7; it must be less than 5"),
        ("lr is -1.0; give", "--lr is -1.0; give"),
        ("the file runs/micro_batch/x and x_micro_batch stay", "the file runs/micro_batch/x and x_micro_batch stay"),
        ("the budget is too small", "the budget is too small"),
    ],
)  # fmt: skip
def test_messages_speak_of_options_as_they_are_typed(said: str, typed: str) -> None:
    names = {"budget", "resume", "epochs", "lr", "micro_batch", "recompute", "warmup_epochs", "seed"}
    assert as_typed(said, names) == typed
    assert as_typed(said, ()) == said


def test_a_budget_that_is_too_small_says_what_to_type() -> None:
    message = refused("plan", MODEL, "--image-size", 12, "--budget", "peak:1 KiB")
    found = re.search(r'type --budget "(peak:[\d.]+ KiB)"', message)
    assert found is not None
    assert trady_here("plan", MODEL, "--image-size", 12, "--budget", found[1]).returncode == 0


# -- options in files


def test_a_run_is_repeated_from_the_options_that_it_has_written(data: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shown = trady_here(
        "finetune", MODEL, data, *QUICK, "--out", first, "--train", "features.0", "--train", "features.3", "--lr", 0.03,
        "--no-keep-best", "--json",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    written = (first / "run.toml").read_text()
    for line in ('train = ["features.0", "features.3"]', "lr = 0.03", "keep_best = false", f'model = "{MODEL}"'):
        assert line in written.splitlines()
    assert not re.search(r"^(json|as_json|resume|overwrite|config|quiet) ", written, re.MULTILINE)
    again = trady_here("finetune", "--config", first / "run.toml", "--out", tmp_path / "again", "--json")
    assert again.returncode == 0, again.stderr
    one, two = (json.loads(each.stdout) for each in (shown, again))
    assert (one["accuracy"], one["train_loss"], one["steps"]) == (two["accuracy"], two["train_loss"], two["steps"])
    settings = [json.loads((tmp_path / name / "result.json").read_text())["settings"] for name in ("first", "again")]
    assert settings[0] == settings[1]


def test_what_is_typed_goes_before_set_and_that_before_the_file(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(f'lr = 0.01\nbatch-size = 6\nseed = 3\nimage_size = 12\nepochs = 1\ndataset = "{data}"\n')
    shown = trady_here(
        "finetune", MODEL, "--set", "batch_size=12", "--config", config, "--set", "lr=0.02", "--lr", 0.04,
        "--out", tmp_path / "run", "--set", "optimizer=adam",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    settings = json.loads((tmp_path / "run" / "result.json").read_text())["settings"]
    found = {name: settings[name] for name in ("lr", "batch_size", "seed", "optimizer")}
    assert found == {"lr": 0.04, "batch_size": 12, "seed": 3, "optimizer": "adam"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate = 1\nlr = 2", "'learning_rate' is not known; there are "),
        ("optimiser = 'adam'", "'optimiser' is not known; did you mean 'optimizer'?"),
        ("[training]\nlr = 1", r"\[training\] is a table"),
        ("lr = ", "is no TOML file"),
        ("lr = 'fast'", "a number"),
        ("policy = 'tradi'", "did you mean 'trady'"),
    ],
)
def test_a_file_of_options_with_a_mistake_is_refused(data: Path, tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text)
    shown = trady_here("finetune", MODEL, data, "--config", config, "--out", tmp_path / "run")
    assert shown.returncode == 2
    assert re.search(said, shown.stderr)
    assert not (tmp_path / "run").exists()


def test_files_and_words_of_options_that_cannot_be_read_are_refused(data: Path, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused("finetune", MODEL, data, "--config", tmp_path / "none.toml")
    assert "is not KEY=VALUE" in refused("finetune", MODEL, data, "--set", "lr")
    assert "--set: 'lrr' is not known; did you mean 'lr'?" in refused("finetune", MODEL, data, "--set", "lrr=1")


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_files_have_the_mode_that_the_umask_leaves(data: Path, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        out = tmp_path / "run"
        log = ("--log-file", out.parent / "run.log")
        assert trady_here("finetune", MODEL, data, *QUICK, "--out", out, *log).returncode == 0
        plan = ("plan", MODEL, "--image-size", 12, "--classes", 3, "--out", tmp_path / "plan.json")
        assert trady_here(*plan).returncode == 0
    finally:
        os.umask(before)
    modes = {
        path: path.stat().st_mode & 0o777 for path in (*out.rglob("*"), out.parent / "run.log", tmp_path / "plan.json")
    }
    assert len(modes) > 9
    assert {path for path, mode in modes.items() if mode != (0o775 if path.is_dir() else 0o664)} == set()


# -- messages


def test_quiet_says_nothing_and_a_log_file_everything(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    shown = trady_here("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run", "--quiet", "--log-file", log)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert shown.stdout.startswith("accuracy ")
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in lines)
    said = [line.partition(" ")[2] for line in lines]
    for start in ("48 + 24 images, 3 classes", "trady trains", "draws from", "trady epoch 1/1: loss", "accuracy "):
        assert any(line.startswith(start) for line in said), start
    refused_again = trady_here("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run", "--log-file", log)
    assert refused_again.returncode == 2  # before there was anything to log
    bad = refused("finetune", MODEL, data, *QUICK, "--out", tmp_path / "new", "--log-file", tmp_path)
    assert "--log-file" in bad


def test_warnings_are_said_in_a_line_and_those_of_others_are_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    messages = Messages()
    messages.open_log(str(tmp_path / "log"))

    def warn() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of ours", TradyWarning, stacklevel=1)
            warnings.warn("of theirs", UserWarning, stacklevel=1)

    with messages.instead_of_warnings(everything=False):
        warn()
    assert capsys.readouterr().err == "warning: of ours\n"
    with messages.instead_of_warnings(everything=True):
        warn()
    assert "UserWarning: of theirs" in capsys.readouterr().err
    messages.close()
    messages.close()
    assert "warning: of ours" in (tmp_path / "log").read_text()


def test_names_of_files_that_are_no_utf8_are_said_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    messages = Messages()
    messages.open_log(str(tmp_path / "log"))
    messages.say("skipped photos/caf\udce9.jpg")
    messages.warn("photos/caf\udce9.jpg")
    messages.close()
    assert capsys.readouterr().err == "skipped photos/caf\\udce9.jpg\nwarning: photos/caf\\udce9.jpg\n"
    assert "caf\\udce9" in (tmp_path / "log").read_text()


def test_a_run_that_learns_nothing_warns_on_the_command_line(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "data.npz", test=90)
    shown = trady_command("finetune", MODEL, data, *QUICK, "--out", tmp_path / "run", "--lr", 1e-7)
    assert shown.returncode == 0, shown.stderr
    (warning,) = [line for line in shown.stderr.splitlines() if line.startswith("warning: ")]
    assert "The rate, 1e-07, is low for this optimizer: leave --lr out for its default, 0.1" in warning
