"""A run is a model: loaded from its folder alone it says of held-out images what it said in training."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trady
from tests.command import MODEL, trady_command, trady_here
from tests.small_runs import run
from tests.small_task import StopAfter, TiedNet, pixels, small_data, small_net
from trady.errors import CheckpointError, DataError, ModelError
from trady.prediction.predictor import Predictor
from trady.training.data.load import load_data
from trady.training.description import read_description

NAMES = ("blue", "green", "red")


def write_folder(folder: Path, count: int, seed: int, names: tuple[str, ...] = NAMES) -> Path:
    """Photographs that are not square, in a folder a class; some turned by their EXIF tag, as a camera leaves them."""
    images, labels = pixels(count, seed, 20)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / names[label] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(image[: 14 + number % 6])
        exif = photo.getexif()
        exif[274] = 1 + number % 8
        photo.save(place, exif=exif)
    return folder


def finetune(data: Path, out: Path, *more: object, model: object = MODEL) -> subprocess.CompletedProcess[str]:
    options = ("--budget", "update:12 KiB", "--image-size", 12, "--batch-size", 8, "--epochs", 3, "--lr", 0.05)
    return trady_here("finetune", model, data, *options, "--out", out, *more)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder / "train", 48, 0)
    write_folder(folder / "val", 25, 1)
    return folder


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "photos"
    done = finetune(photos, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


# -- equal to training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["last", "best"])
def test_accuracy_on_the_held_out_folder_is_that_of_the_run(trained: Path, photos: Path, weights: str) -> None:
    shown = trady_here("predict", trained, photos / "val", "--json", "--weights", weights)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    result = result_of(trained)
    assert found["accuracy"] == result["accuracy" if weights == "last" else "best_accuracy"]
    assert found["epoch"] == (result["epochs"] - 1 if weights == "last" else result["best_epoch"])
    assert (found["labelled"], found["unreadable"]) == (25, 0)
    assert 1 / 3 < found["accuracy"] < 1  # or equal accuracies would mean little


def test_and_in_a_fresh_process_from_another_place(copied: Path, trained: Path, photos: Path) -> None:
    shown = trady_command("predict", copied, photos, "--json")
    assert shown.returncode == 0, shown.stderr
    assert "photos0/val is taken, which was not trained on" in shown.stderr
    assert json.loads(shown.stdout)["accuracy"] == result_of(trained)["accuracy"]


def test_inputs_and_scores_are_those_of_the_evaluation_bit_for_bit(trained: Path, photos: Path) -> None:
    loaded = trady.load(trained)
    assert isinstance(loaded, Predictor)
    evaluation = load_data(photos, image_size=12).evaluation
    files = [path for name in NAMES for path in sorted((photos / "val" / name).iterdir())]
    expected, _ = evaluation.batch(range(len(evaluation)))
    assert torch.equal(torch.stack([loaded.preprocess(path) for path in files]), expected)
    assert torch.equal(torch.stack([loaded.preprocess(Image.open(path)) for path in files]), expected)
    assert loaded.classes == NAMES
    assert not loaded.model.training
    with torch.no_grad():
        scores = loaded.model(expected[:8])
    first = loaded.predict(files, batch_size=8, top=3)[:8]
    for prediction, shares in zip(first, scores.softmax(-1), strict=True):
        assert dict(prediction.top) == {name: float(share) for name, share in zip(NAMES, shares, strict=True)}
        assert prediction.label == NAMES[int(shares.argmax())]
        assert prediction.score == prediction.top[0][1] == float(shares.max())


def test_arrays_of_an_npz_file_are_predicted_as_they_were_evaluated(tmp_path: Path) -> None:
    x, y = pixels(48, 0, 20)
    test_x, test_y = pixels(25, 1, 20)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=test_x, y_test=test_y, classes=np.array(NAMES))
    assert finetune(tmp_path / "data.npz", tmp_path / "run").returncode == 0
    shown = trady_here("predict", tmp_path / "run", tmp_path / "data.npz", "--json")
    assert json.loads(shown.stdout)["accuracy"] == result_of(tmp_path / "run")["accuracy"]
    loaded = trady.load(tmp_path / "run")
    labels = [prediction.label for prediction in loaded.predict(test_x)]
    assert labels == [each["label"] for each in json.loads(shown.stdout)["predictions"]]
    assert [loaded.predict(image)[0].label for image in test_x[:3]] == labels[:3]
    np.savez(tmp_path / "alone.npz", images=test_x)
    alone = json.loads(trady_here("predict", tmp_path / "run", tmp_path / "alone.npz", "--json").stdout)
    assert alone["accuracy"] is None
    assert [each["label"] for each in alone["predictions"]] == labels
    assert alone["predictions"][3]["path"] == f"{tmp_path / 'alone.npz'}[3]"
    assert [loaded.predict(image[..., 0])[0].source for image in test_x[:1]] == ["0"]


def test_bf16_and_a_micro_batch_are_those_of_the_run(photos: Path, tmp_path: Path) -> None:
    done = finetune(photos, tmp_path / "run", "--mixed-precision", "bf16", "--micro-batch", 3)
    assert done.returncode == 0, done.stderr
    described = read_description(tmp_path / "run")
    assert (described.precision, described.batch_size) == ("bf16", 3)
    loaded = trady.load(tmp_path / "run")
    assert loaded.batch_size == 3
    shown = trady_here("predict", tmp_path / "run", photos / "val", "--json")
    assert json.loads(shown.stdout)["accuracy"] == result_of(tmp_path / "run")["accuracy"]


# -- what the command prints ---------------------------------------------------------------------------------------


def test_the_table_the_csv_and_top_k(trained: Path, photos: Path, tmp_path: Path) -> None:
    picture = photos / "val" / "red" / "2.png"
    out = tmp_path / "p.csv"
    shown = trady_here("predict", trained, picture, "--top", 2, "--out", out)
    assert shown.returncode == 0, shown.stderr
    ((first, second),) = [prediction.top for prediction in trady.load(trained).predict(picture, top=2)]
    assert first[0] in shown.stdout
    assert f"{second[1]:.1%}" in shown.stdout
    assert "1 predicted with the last weights (epoch 3 of 3)" in shown.stdout
    assert "accuracy" not in shown.stdout
    rows = read_csv(out)
    assert rows[0] == ["path", "label", "score"]
    assert [(path, label, float(score)) for path, label, score in rows[1:]] == [
        (str(picture), *first), (str(picture), *second)
    ]  # fmt: skip


def test_a_picture_that_cannot_be_read_has_a_row_and_the_others_are_done(
    trained: Path, photos: Path, tmp_path: Path
) -> None:
    whole = (photos / "val" / "red" / "2.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d.png").write_bytes(whole)
    (tmp_path / "notes.txt").write_text("no picture, and not asked for")
    shown = trady_here("predict", trained, tmp_path, "--json", "--out", tmp_path / "p.csv")
    assert shown.returncode == 0, shown.stderr
    a, b, c, d = json.loads(shown.stdout)["predictions"]
    assert (a["label"], a["score"]) == (d["label"], d["score"])
    assert b["label"] is None
    assert "truncated" in b["error"]
    assert "No such file" in c["error"]
    rows = read_csv(tmp_path / "p.csv")
    assert [len(row) for row in rows] == [3] * 5
    assert rows[2] == [str(tmp_path / "b.png"), "", ""]
    table = trady_here("predict", trained, tmp_path)
    assert "cannot be read:" in table.stdout
    assert "2 predicted with the last weights (epoch 3 of 3); 2 could not be read" in table.stdout
    none = trady_here("predict", trained, tmp_path / "b.png", tmp_path / "c.jpg")
    assert none.returncode == 2
    assert "none of the 2 images could be read" in none.stderr


def test_names_are_printed_as_they_are(trained: Path, photos: Path, tmp_path: Path) -> None:
    name = "[red]x,\ny.png"
    shutil.copy(photos / "val" / "red" / "2.png", tmp_path / name)
    shown = trady_here("predict", trained, tmp_path, "--out", tmp_path / "p.csv")
    assert shown.returncode == 0, shown.stderr
    assert "[red]x," in shown.stdout
    assert read_csv(tmp_path / "p.csv")[1][0] == str(tmp_path / name)


def test_accuracy_counts_what_lies_in_a_folder_of_a_class(trained: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "val" / "red", tmp_path / "red")
    shutil.copytree(photos / "val" / "blue", tmp_path / "violet")
    shutil.copytree(photos / "val" / "blue", tmp_path / ".hidden")
    shown = trady_here("predict", trained, tmp_path, "--json")
    count = len(list((tmp_path / "red").iterdir()))
    assert json.loads(shown.stdout)["labelled"] == count
    assert f"9 of {count + 9} images in {tmp_path} are in no folder of a class of the run: violet" in shown.stderr


# -- what a run says of itself -------------------------------------------------------------------------------------


def test_the_folder_says_where_the_model_comes_from(trained: Path, photos: Path) -> None:
    found = read_description(trained)
    assert (found.model.name, found.model.outputs, found.classes) == (MODEL, 3, NAMES)
    assert found.images is not None
    assert (found.images.size, found.images.mean, found.images.std) == (12, (127.5,), (127.5,))
    assert found.data["source"] == str(photos)
    assert len(found.data["evaluation pixels"]) == 16
    assert found.versions["torch"] == torch.__version__
    assert {"trady", "python", "numpy", "pillow"} <= set(found.versions)
    assert found.command is not None
    assert found.command[:4] == ("trady", "finetune", MODEL, str(photos))
    assert found.device.startswith("cpu")
    assert (found.policy, found.budget, found.ranking) == ("trady", "update:12 KiB", "online")
    assert set(found.weights) == {"last", "best"}


def test_a_resumed_run_keeps_where_it_comes_from_and_one_of_before_is_described(copied: Path, photos: Path) -> None:
    before = read_description(copied)
    assert finetune(photos, copied, "--resume").returncode == 0
    assert read_description(copied) == before
    (copied / "run.json").unlink()
    shown = trady_here("predict", copied, photos)
    assert shown.returncode == 2
    assert "it is of an earlier trady" in shown.stderr
    assert "--resume" in shown.stderr
    assert finetune(photos, copied, "--resume").returncode == 0
    assert replace(read_description(copied), command=before.command, started=before.started) == before


def test_a_module_of_python_is_loaded_into_a_module_that_is_given(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=1)
    with pytest.raises(ModelError, match=r"made in Python \(tests.small_task.SmallNet\).*model=module"):
        trady.load(tmp_path / "run")
    with pytest.raises(ModelError, match=r"classifier.weight is \[5, 16\], in the run \[3, 16\]"):
        trady.load(tmp_path / "run", model=small_net(5))
    with pytest.raises(ModelError, match=r"the run lacks weight, bias; the module lacks features\."):
        trady.load(tmp_path / "run", model=torch.nn.Linear(2, 3))
    loaded = trady.load(tmp_path / "run", model=small_net())
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in loaded.model.state_dict().items())
    data = small_data(24, 1)
    found = [int(prediction.label or -1) for prediction in loaded.predict(data.pixels)]
    assert np.mean(np.asarray(found) == data.labels) == result.accuracy


def test_a_model_with_tied_weights_comes_back(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=1, model=TiedNet())
    loaded = trady.load(tmp_path / "run", model=TiedNet())
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in loaded.model.state_dict().items())


def test_apply_delta_by_path_makes_the_model_of_the_run(trained: Path) -> None:
    base = small_net()
    assert trady.apply_delta(base, trained / "delta.safetensors") is base
    expected = trady.load(trained).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.state_dict().items())


# -- a run as the model of a new one -------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_run_and_gets_a_new_head_for_other_classes(
    trained: Path, photos: Path, tmp_path: Path
) -> None:
    same = finetune(photos, tmp_path / "same", "--policy", "head", "--lr", 1e-9, model=trained)
    assert same.returncode == 0, same.stderr
    assert "new head" not in same.stderr
    assert result_of(tmp_path / "same")["accuracy"] == result_of(trained)["accuracy"]
    old, new = (trady.load(folder).model.state_dict() for folder in (trained, tmp_path / "same"))
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    described = read_description(tmp_path / "same").model
    assert (described.name, described.started_from) == (MODEL, str(trained))

    for count in (3, 2):
        names = ("cat", "dog", "fox")[:count]
        other = write_folder(tmp_path / f"other{count}", 24, 3, names if count == 3 else ("cat", "dog", "dog"))
        still = ("--policy", "head", "--epochs", 1, "--lr", 1e-9)
        done = finetune(other, tmp_path / f"run{count}", *still, model=trained)
        assert done.returncode == 0, done.stderr
        expected = f"a new head for {count} classes ({', '.join(names)}): the head of {trained} is for 3 classes (blue,"
        assert expected in done.stderr
        loaded = trady.load(tmp_path / f"run{count}")
        assert loaded.classes == names
        weights = loaded.model.state_dict()
        assert torch.equal(weights["features.3.weight"], old["features.3.weight"])
        assert weights["classifier.weight"].shape == (count, 16)
        fresh = small_net(count).classifier.weight
        assert torch.allclose(weights["classifier.weight"], fresh, atol=1e-6)
        assert not torch.allclose(old["classifier.weight"][:count], fresh, atol=1e-4)


def test_a_run_made_in_python_is_no_model_by_name(tmp_path: Path, photos: Path) -> None:
    run(tmp_path / "run", epochs=1)
    shown = finetune(photos, tmp_path / "next", model=tmp_path / "run")
    assert shown.returncode == 2
    assert "was trained from a module that was made in Python" in shown.stderr


# -- bad input -----------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    shown = trady_here("predict", *arguments)
    assert shown.returncode == 2, (shown.stdout, shown.stderr)
    assert "Traceback" not in shown.stderr
    return str(shown.stderr)


def test_a_typo_of_the_run_is_answered_with_the_nearest(copied: Path, photos: Path) -> None:
    assert f"does not exist; did you mean {copied}?" in refused(copied.with_name("copid"), photos)
    assert f"is no run folder, but holds some: {copied}" in refused(copied.parent, photos)
    assert "is a file, not a run folder" in refused(copied / "plan.json", photos)


def test_a_typo_of_a_run_as_model_is_answered_before_the_hub_is_asked(copied: Path, photos: Path) -> None:
    shown = finetune(photos, copied.parent / "new", model=copied.with_name("copeid"))
    assert shown.returncode == 2
    assert f"no model '{copied.with_name('copeid')}'; did you mean '{copied}'?" in shown.stderr


def test_folders_without_images_say_what_they_hold(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty: there is no image in it" in refused(trained, tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.TXT", "c.heic", ".hidden.png"):
        (tmp_path / "texts" / name).write_text("x")
    message = refused(trained, tmp_path / "texts")
    assert "holds no image, but 2 .txt, 1 .heic (read with pip install pillow-heif); images that are read" in message
    assert f"{tmp_path / 'phto.jpg'} does not exist" in refused(trained, tmp_path / "phto.jpg")
    assert "none of the 1 images could be read" in refused(trained, tmp_path / "texts" / "a.txt")


def test_a_run_of_a_newer_version_is_refused(copied: Path, photos: Path) -> None:
    written = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**written, "version": 2}))
    assert "is of version 2, this trady reads version 1: use the trady that wrote it" in refused(copied, photos)
    (copied / "run.json").write_text(json.dumps({**written, "classes": ["a", 3]}))
    assert "classes[1] is 3, not a text" in refused(copied, photos)
    (copied / "run.json").write_text("{")
    assert "is no description of a run, or is cut short" in refused(copied, photos)


def test_weights_that_are_missing_or_changed_are_refused(copied: Path, photos: Path) -> None:
    (copied / "model.safetensors").rename(copied / "kept")
    assert "model.safetensors is missing, the last weights of the run: take --weights best" in refused(copied, photos)
    assert trady.load(copied, "best").weights == "best"
    shutil.copy(copied / "best.safetensors", copied / "model.safetensors")
    content = bytearray((copied / "kept").read_bytes())
    content[-1] ^= 1
    (copied / "model.safetensors").write_bytes(content)
    assert "is not the file that the run has written: its SHA-256 is another one" in refused(copied, photos)
    assert "there are no weights 'newest' of a run" in refused(copied, photos, "--weights", "newest")


def test_a_run_that_is_not_finished_offers_its_best_weights(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=StopAfter(1))
    with pytest.raises(CheckpointError, match=r"is not finished: go on with it by --resume.*\(of epoch 1\): --weights"):
        trady.load(tmp_path / "run", model=small_net())
    assert trady.load(tmp_path / "run", "best", model=small_net()).epoch == 0


def test_what_is_no_image_is_said_in_python_too(trained: Path) -> None:
    loaded = trady.load(trained)
    with pytest.raises(DataError, match=r"float64 \[4, 4, 3\] is no image; expected uint8"):
        loaded.preprocess(np.zeros((4, 4, 3)))
    with pytest.raises(DataError, match="a Tensor is no image"):
        loaded.preprocess(torch.zeros(3, 4, 4))
    (prediction,) = loaded.predict(np.zeros((4, 4, 3)))
    assert prediction.label is None
    assert "is no image" in str(prediction.error)
    with pytest.raises(DataError, match="top is 0"):
        loaded.predict([], top=0)
    assert loaded.predict([]) == []


def test_a_run_on_data_of_ones_own_is_a_model_without_preprocessing(tmp_path: Path, photos: Path) -> None:
    data = torch.utils.data.TensorDataset(*small_data(24, 0).batch(range(24)))
    run(tmp_path / "run", data=(data, data), epochs=1)
    loaded = trady.load(tmp_path / "run", model=small_net())
    assert loaded.scores(data.tensors[0][:4]).shape == (4, 3)
    with pytest.raises(DataError, match="trained on data that trady did not read"):
        loaded.predict(photos / "val")
    assert "trained on data that trady did not read" in refused(tmp_path / "run", photos)
