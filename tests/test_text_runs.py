"""Runs on texts: they train, predict as they were evaluated, and are folders of transformers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import trady
from tests.command import trady_here
from tests.fresh_process import afresh
from tests.small_runs import lines, without_clock
from tests.small_task import Raise
from tests.small_texts import bert_folder, llama_folder, sentences, write_table
from tests.text_commands import BUDGET, OPTIONS, finetune, predicted, refused, result_of
from trady.cli.app import app
from trady.errors import ModelError
from trady.training.description import read_description
from trady.training.interrupt import Stopped

pytest.importorskip("datasets")
pytest.importorskip("transformers")

#: A few sentences of few words are learnt slowly.
pytestmark = pytest.mark.filterwarnings("ignore:accuracy .* and guessing has:trady.errors.TradyWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a table to train on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    bert_folder(folder / "bert")
    llama_folder(folder / "llama")
    write_table(folder / "train.csv", sentences(96, 0, ("bad", "good", "odd")))
    write_table(folder / "dev.csv", sentences(61, 1, ("bad", "good", "odd")))
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run of full fine-tuning, whose model is gone."""
    model = shutil.copytree(place / "bert", place / "lent")
    said = finetune(
        model, place / "train.csv", place / "run", "--evaluation", place / "dev.csv", "--policy", "full", "--epochs", 4
    )
    assert "96 rows of" in said
    assert "61 of dev.csv to evaluate on; texts in text, 3 classes in label: bad (32), good (32), odd (32)" in said
    assert "tokens at the median" in said
    shutil.rmtree(model)
    return place / "run"


@pytest.mark.parametrize("weights", ["last", "best"])
def test_accuracy_is_that_of_the_run(trained: Path, place: Path, weights: str) -> None:
    found, expected = predicted(trained, place / "dev.csv", "--weights", weights), result_of(trained)
    assert found["accuracy"] == expected["accuracy" if weights == "last" else "best_accuracy"]
    assert found["labelled"] == 61
    assert len({each["label"] for each in found["predictions"]}) > 1
    assert expected["best_accuracy"] > 0.6
    if weights == "last":
        assert found["measures"] == expected["measures"]


def test_from_pretrained_and_pipeline_say_the_same_in_a_fresh_process(trained: Path, place: Path) -> None:
    found = afresh(
        f"""
import csv, json, torch, transformers
run = {str(trained)!r}
rows = list(csv.DictReader(open({str(place / "dev.csv")!r})))
model = transformers.AutoModelForSequenceClassification.from_pretrained(run).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(run)
classify = transformers.pipeline("text-classification", model=run)
texts = [row["text"] for row in rows]
with torch.no_grad():
    scores = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
print(json.dumps({{
    "labels": [model.config.id2label[int(row.argmax())] for row in scores],
    "piped": [each["label"] for each in classify(texts)],
    "ids": model.config.label2id, "scores": scores.softmax(-1).tolist(), "actual": [row["label"] for row in rows],
}}))
"""
    )
    assert found["ids"] == {"bad": 0, "good": 1, "odd": 2}
    hits = [label == actual for label, actual in zip(found["labels"], found["actual"], strict=True)]
    assert sum(hits) / len(hits) == result_of(trained)["accuracy"]
    assert found["piped"] == found["labels"]
    texts = [text for text, _ in sentences(61, 1, ("bad", "good", "odd"))]
    for each, row in zip(trady.load(trained).predict(texts, top=3), found["scores"], strict=True):
        assert [dict(each.top)[name] for name in ("bad", "good", "odd")] == pytest.approx(row, abs=1e-5)


def test_texts_come_from_the_line_from_standard_input_and_from_files(trained: Path, place: Path) -> None:
    texts = [text for text, _ in sentences(5, 9)]
    expected = [(each.source, each.label) for each in trady.load(trained).predict(texts)]
    (place / "lines.txt").write_text("\n".join(texts) + "\n")
    (place / "rows.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 7}) for text in texts))
    for source in (texts, [place / "lines.txt"], [place / "rows.jsonl"]):
        found = predicted(trained, *source)
        assert [(each["text"], each["label"]) for each in found["predictions"]] == expected
        assert found["accuracy"] is None
    shown = CliRunner().invoke(app, ["predict", str(trained), "-", "--json"], input="\n".join(texts))
    assert [each["label"] for each in json.loads(shown.stdout)["predictions"]] == [label for _, label in expected]


def test_a_csv_file_has_the_columns_of_the_text_and_a_row_a_class(trained: Path, tmp_path: Path) -> None:
    done = trady_here("predict", trained, "a grand film", "", "--top", 2, "--out", tmp_path / "p.csv")
    assert done.returncode == 0
    assert "the text is empty" in done.stdout
    assert "1 could not be read" in done.stdout
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["a grand film", "a grand film", ""]
    assert float(rows[0]["score"]) >= float(rows[1]["score"]) > 0
    assert rows[2]["label"] == ""


def test_a_tenth_is_kept_and_found_again(place: Path) -> None:
    said = finetune(place / "bert", place / "train.csv", place / "held", "--policy", "full")
    assert "86 rows to train on, 10 kept to evaluate on" in said
    done = trady_here("predict", place / "held", place / "train.csv", "--json")
    assert json.loads(done.stdout)["accuracy"] == result_of(place / "held")["accuracy"]
    assert json.loads(done.stdout)["labelled"] == 10
    assert "the 10 rows are taken that it has kept to evaluate on" in done.stderr


def test_pairs_are_given_two_by_two(place: Path) -> None:
    rows = [(a, b, int(label == "good")) for (a, label), (b, _) in zip(sentences(40, 2), sentences(40, 3), strict=True)]
    data = write_table(place / "pairs.tsv", rows, ("premise", "hypothesis", "label"))
    finetune(place / "bert", data, place / "pairs", *BUDGET)
    found = predicted(place / "pairs", "a grand film", "it was dull", "the plot", "was fine")
    assert [(each["premise"], each["hypothesis"]) for each in found["predictions"]] == [
        ("a grand film", "it was dull"),
        ("the plot", "was fine"),
    ]
    assert predicted(place / "pairs", data)["accuracy"] == result_of(place / "pairs")["accuracy"]
    assert "give two for each, and these are 1" in refused("predict", place / "pairs", "a grand film")
    loaded = trady.load(place / "pairs")
    assert len(loaded.predict(("a film", "is fine"))) == len(loaded.predict([("a film", "is fine")])) == 1


def test_numbers_and_several_labels_are_predicted_with_the_measures_of_the_run(place: Path) -> None:
    rows = [(text, len(text) / 10, int("film" in text), int("plot" in text)) for text, _ in sentences(60, 4)]
    numbers = write_table(place / "numbers.csv", [row[:2] for row in rows], ("sentence", "score"))
    several = write_table(place / "several.csv", [(row[0], *row[2:]) for row in rows], ("text", "film", "plot"))
    assert "numbers from" in finetune(place / "bert", numbers, place / "numbers", *BUDGET)
    columns = ("--label-column", "film", "--label-column", "plot")
    assert "2 labels: film (" in finetune(place / "bert", several, place / "several", *BUDGET, *columns)
    for name, accuracy in (("numbers", None), ("several", result_of(place / "several")["accuracy"])):
        found, expected = predicted(place / name, place / f"{name}.csv"), result_of(place / name)
        assert found["measures"] == expected["measures"]
        assert (found["accuracy"], expected["accuracy"]) == (accuracy, accuracy)
    assert set(result_of(place / "numbers")["measures"]) == {"mse", "pearson"}
    both = predicted(place / "several", "a film with a plot", "--top", 2)["predictions"][0]
    assert {each["label"] for each in both["top"]} == {"film", "plot"}
    history = [json.loads(line) for line in (place / "numbers" / "metrics.jsonl").read_text().splitlines()]
    assert result_of(place / "numbers")["best_epoch"] == min(history, key=lambda m: m["evaluation_loss"])["epoch"]


def test_a_text_in_parts_is_predicted_as_it_was_evaluated(place: Path) -> None:
    rows = [(" ".join([text] * (1 + at % 3)), label) for at, (text, label) in enumerate(sentences(60, 5))]
    data = write_table(place / "long.csv", rows)
    said = finetune(place / "bert", data, place / "split", "--max-length", 12, "--overflow", "split", *BUDGET)
    assert "what exceeds 12 is cut into parts" in said
    assert read_description(place / "split").texts.longest == 12  # type: ignore[union-attr]
    found = predicted(place / "split", data)
    assert found["accuracy"] == result_of(place / "split")["accuracy"]
    assert found["labelled"] == 6
    assert "texts are longer than 12 tokens" in refused(
        "finetune", place / "bert", data, "--max-length", 12, "--overflow", "error", *BUDGET, "--out", place / "x"
    )


def test_a_classifier_of_a_model_that_reads_from_the_left(place: Path) -> None:
    finetune(place / "llama", place / "train.csv", place / "left", *BUDGET, "--evaluation", place / "dev.csv")
    assert predicted(place / "left", place / "dev.csv")["accuracy"] == result_of(place / "left")["accuracy"]


def test_a_run_goes_on_with_its_head_or_a_new_one(trained: Path, place: Path) -> None:
    said = finetune(trained, place / "train.csv", place / "on", "--policy", "head", "--epochs", 1)
    assert "a new head" not in said
    before, after = trady.load(trained).model.state_dict(), trady.load(place / "on").model.state_dict()
    body = [name for name in before if not name.startswith("classifier.")]
    assert all(torch.equal(before[name], after[name]) for name in body)
    other = write_table(place / "two.csv", sentences(40, 6))
    said = finetune(trained, other, place / "two", "--policy", "head", "--epochs", 1)
    assert "a new head for 2 classes (bad, good): the head of" in said
    loaded = trady.load(place / "two")
    assert loaded.classes == ("bad", "good")
    assert all(torch.equal(before[name], loaded.model.state_dict()[name]) for name in body)


def test_the_python_way_is_that_of_the_command_line(place: Path, tmp_path: Path) -> None:
    task = trady.load_texts(place / "train.csv", place / "bert", evaluation=place / "dev.csv")
    options: dict[str, Any] = {"budget": "1 MiB", "batch_size": 8, "epochs": 2, "optimizer": "adamw", "lr": 0.01}
    trady.finetune(task.model, task.train, task.evaluation, out=tmp_path / "python", progress=False, **options)
    finetune(
        place / "bert",
        place / "train.csv",
        tmp_path / "typed",
        "--evaluation",
        place / "dev.csv",
        *BUDGET,
        "--epochs",
        2,
    )
    mine, typed = (load_file(tmp_path / name / "model.safetensors") for name in ("python", "typed"))
    assert mine.keys() == typed.keys()
    assert all(torch.equal(value, typed[name]) for name, value in mine.items())
    assert trady.load(tmp_path / "python").predict("a grand film")[0].label in ("bad", "good", "odd")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a system without SIGHUP")
def test_a_run_that_was_stopped_inside_an_epoch_ends_as_the_unbroken_one(place: Path, tmp_path: Path) -> None:
    def run(name: str, **more: Any) -> None:
        task = trady.load_texts(place / "train.csv", place / "bert")
        options: dict[str, Any] = {"budget": "1 MiB", "batch_size": 8, "epochs": 2, "optimizer": "adamw", "lr": 0.01}
        trady.finetune(
            task.model, task.train, task.evaluation, out=tmp_path / name, **{**options, "progress": False, **more}
        )

    run("whole")
    with pytest.raises(Stopped):
        run("stopped", progress=Raise(signal.SIGTERM, 15))
    run("stopped", resume=True)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    assert without_clock(lines(tmp_path / "stopped")) == without_clock(lines(tmp_path / "whole"))


def test_several_processes_share_the_texts_and_one_line_is_read_aloud(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trady"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    options = ("--evaluation", place / "dev.csv", "--out", tmp_path / "run", *BUDGET, *OPTIONS, "--epochs", 2)
    arguments = [*command, "finetune", place / "bert", place / "train.csv", *options]
    done = subprocess.run([*map(str, arguments)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("61 of dev.csv to evaluate on") == 1
    assert result_of(tmp_path / "run")["steps"] == 2 * 6
    found = predicted(tmp_path / "run", place / "dev.csv")
    assert (found["accuracy"], found["measures"]) == (
        result_of(tmp_path / "run")["accuracy"],
        result_of(tmp_path / "run")["measures"],
    )


def test_the_plan_is_made_for_the_longest_batch_and_the_first_step_is_the_largest(place: Path, tmp_path: Path) -> None:
    finetune(place / "bert", place / "train.csv", tmp_path / "run", *BUDGET, "--epochs", 1)
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert lines(tmp_path / "run")[0]["peak_bytes"] <= planned["predicted_peak_bytes"] <= 2**20
    shown = trady_here("plan", place / "bert", place / "train.csv", *BUDGET, "--batch-size", 8, "--json")
    forecast = json.loads(shown.stdout)
    assert forecast["batch"] == 8
    assert forecast["cost"] == planned["cost"]  # both count AdamW
    assert forecast["predicted_peak_bytes"] == planned["predicted_peak_bytes"]
    less = trady_here(
        "plan", place / "bert", place / "train.csv", *BUDGET, "--batch-size", 8, "--json", "--optimizer=sgd"
    )
    assert json.loads(less.stdout)["predicted_peak_bytes"] < forecast["predicted_peak_bytes"]


@pytest.mark.parametrize(
    ("model", "data", "more", "message"),
    [
        ("efficientnet-lite0", "train.csv", (), r"efficientnet-lite0 is no model of texts"),
        ("bert", "train.csv", ("--image-size", 32), r"--image-size is for images, and"),
        ("bert", "train.csv", ("--augment", "light"), r"--augment is for images, and"),
        ("bert", "train.csv", ("--max-length", 64), r"--max-length is 64, and .*bert takes up to 32 tokens"),
        (
            "bert",
            "train.csv",
            ("--overflow", "cut"),
            r"--overflow 'cut' is not known; there are truncate, split, error",
        ),
        ("bert", "train.csv", ("--task", "tagging"), r"--task 'tagging' is not known; there are classification"),
        ("bert", "train.csv", ("--label-column", "labl"), r"no column 'labl'.*it has text, label. Did you mean label"),
        ("bert", "train.csv", ("--evaluation", "gone.csv"), r"gone.csv does not exist"),
        ("bert", "gone.csv", (), r"gone.csv does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_trains(
    model: str, data: str, more: tuple[object, ...], message: str, place: Path, tmp_path: Path
) -> None:
    import re

    name = place / model if (place / model).exists() else model
    said = refused("finetune", name, place / data, "--out", tmp_path / "run", *BUDGET, *more)
    assert re.search(message, " ".join(said.split())), said
    assert not (tmp_path / "run").exists()


def test_runs_and_data_of_another_kind_are_refused(trained: Path, place: Path, tmp_path: Path) -> None:
    from tests.small_task import write_npz

    images = write_npz(tmp_path / "images.npz")
    assert "is no table of texts, and the run takes texts" in refused("predict", trained, images)
    assert "gone.csv does not exist" in refused("predict", trained, "gone.csv")
    other = write_table(tmp_path / "other.csv", [("x", 1)], ("satz", "urteil"))
    assert "has no column 'text', which the run takes its texts from; it has satz, urteil" in refused(
        "predict", trained, other
    )
    out = ("--out", tmp_path / "run", "--policy", "full", "--epochs", 1)
    assert "is for texts" in refused("finetune", place / "bert", images, *out, "--text-column", "x")
    done = trady_here("finetune", "tests.small_task:small_net", images, "--out", tmp_path / "images", *out[2:])
    assert done.returncode == 0
    assert "is a run on images, and the data are texts" in refused(
        "finetune", tmp_path / "images", place / "dev.csv", *out
    )
    with pytest.raises(ModelError, match="is no model of texts"):
        trady.load_texts(place / "dev.csv", "tests.small_task:small_net")


def test_a_tokenizer_that_is_missing_is_asked_for(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "bert", tmp_path / "bert")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "put its tokenizer.json and tokenizer_config.json beside config.json" in " ".join(
        refused("finetune", folder, place / "train.csv", "--policy", "full", "--out", tmp_path / "run").split()
    )


def test_layers_are_ranked_on_texts_and_other_commands_say_that_they_take_images(place: Path, tmp_path: Path) -> None:
    done = trady_here(
        "rank",
        place / "bert",
        place / "train.csv",
        "--batches",
        2,
        "--batch-size",
        8,
        "--no-prior",
        "--out",
        tmp_path / "r.json",
    )
    assert done.returncode == 0, done.stderr
    finetune(place / "bert", place / "train.csv", tmp_path / "run", *BUDGET, "--ranking", tmp_path / "r.json")
    said = refused("study", place / "bert", place / "train.csv", "--out", tmp_path / "study", "--seeds", 1)
    assert "is texts, which trady finetune, plan and rank take; this command takes images" in " ".join(said.split())


def test_a_run_on_texts_is_no_model_of_images(trained: Path, tmp_path: Path) -> None:
    from tests.small_task import write_npz

    said = refused("finetune", trained, write_npz(tmp_path / "i.npz"), "--policy", "full", "--out", tmp_path / "run")
    assert "is a run on texts, and the data are images" in " ".join(said.split())
