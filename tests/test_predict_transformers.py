"""A run on a model of transformers is one of its folders: from_pretrained and pipeline read it, and say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trady
from tests.command import trady_here
from tests.fresh_process import afresh
from tests.small_task import pixels
from trady.errors import StateError
from trady.training.description import read_description
from trady.training.models.transformers_files import configuration
from trady.training.run_folder import RunFolder
from trady.training.saver import all_weights

transformers = pytest.importorskip("transformers")

NAMES = ("blue", "green", "red")
SIZE = 12


def vit(**changed: Any) -> Any:
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**small, image_size=SIZE, patch_size=4, **changed)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.ViTForImageClassification(config)


def write_folder(folder: Path, count: int, seed: int, side: int = 20) -> None:
    """Square photographs, which transformers and trady resize alike."""
    images, labels = pixels(count, seed, side)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / NAMES[label] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder / "train", 48, 0)
    write_folder(folder / "val", 25, 1)
    return folder


def finetune(model: object, photos: Path, out: Path, *more: object) -> None:
    options = ("--budget", "2 MiB", "--batch-size", 8, "--epochs", 3, "--lr", 0.2)
    done = trady_here("finetune", model, photos, *options, "--out", out, *more)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a pretrained folder of ten other classes, which is gone afterwards."""
    place = tmp_path_factory.mktemp("models")
    vit(num_labels=10).save_pretrained(place / "vit")
    finetune(place / "vit", photos, place / "run")
    shutil.rmtree(place / "vit")
    return place / "run"


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


@pytest.mark.parametrize("weights", ["last", "best"])
def test_accuracy_is_that_of_the_run_without_the_model_that_it_began_with(
    trained: Path, photos: Path, weights: str
) -> None:
    shown = trady_here("predict", trained, photos, "--json", "--weights", weights)
    assert shown.returncode == 0, shown.stderr
    expected = result_of(trained)["accuracy" if weights == "last" else "best_accuracy"]
    assert json.loads(shown.stdout)["accuracy"] == expected
    assert expected > 1 / 3


def test_from_pretrained_and_pipeline_say_the_same_in_a_fresh_process(trained: Path, photos: Path) -> None:
    found = afresh(
        f"""
import json, pathlib, torch, transformers
from PIL import Image
run, photos = {str(trained)!r}, pathlib.Path({str(photos / "val")!r})
files = sorted(photos.rglob("*.png"))
model = transformers.AutoModelForImageClassification.from_pretrained(run).eval()
processor = transformers.AutoImageProcessor.from_pretrained(run)
classify = transformers.pipeline("image-classification", model=run)
inputs = torch.cat([processor(Image.open(path), return_tensors="pt")["pixel_values"] for path in files])
with torch.no_grad():
    scores = model(inputs).logits
print(json.dumps({{
    "labels": [model.config.id2label[int(row.argmax())] for row in scores],
    "piped": [classify(str(path), top_k=1)[0]["label"] for path in files],
    "ids": model.config.label2id, "inputs": inputs.tolist(), "scores": scores.softmax(-1).tolist(),
    "actual": [path.parent.name for path in files],
}}))
"""
    )
    assert found["ids"] == {name: number for number, name in enumerate(NAMES)}
    hits = [label == actual for label, actual in zip(found["labels"], found["actual"], strict=True)]
    assert sum(hits) / len(hits) == result_of(trained)["accuracy"]
    assert found["piped"] == found["labels"]
    loaded = trady.load(trained)
    files = sorted((photos / "val").rglob("*.png"))
    ours = torch.stack([loaded.preprocess(path) for path in files])
    assert torch.allclose(ours, torch.tensor(found["inputs"]), atol=1e-6)
    predicted = loaded.predict(files, top=3)
    assert [each.label for each in predicted] == found["labels"]
    for each, row in zip(predicted, found["scores"], strict=True):
        assert [dict(each.top)[name] for name in NAMES] == pytest.approx(row, abs=1e-5)


def test_photographs_that_are_not_square_differ_by_less_than_a_pixel_is_wide(trained: Path) -> None:
    loaded = trady.load(trained)
    processor = transformers.AutoImageProcessor.from_pretrained(trained)
    rise = np.linspace(0, 255, 60)[None, :, None] * np.ones((40, 1, 3))
    image = Image.fromarray(rise.astype(np.uint8))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    per_pixel = float((theirs[:, :, 1:] - theirs[:, :, :-1]).max())
    assert 0 < float((loaded.preprocess(image) - theirs).abs().max()) < per_pixel


def test_a_module_of_python_needs_no_module_to_be_loaded(photos: Path, tmp_path: Path) -> None:
    data = trady.load_data(photos, image_size=SIZE)
    model = vit(num_labels=3)
    before = model.config.to_dict()
    result = trady.finetune(
        model, data.train, data.evaluation, policy="full", epochs=1, batch_size=8, out=tmp_path, progress=False
    )
    assert model.config.to_dict() == before
    loaded = trady.load(tmp_path)
    assert loaded.classes == NAMES
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in loaded.model.state_dict().items())
    described = read_description(tmp_path).model
    assert (described.name, described.outputs, described.transformers) == (None, 3, True)


def test_a_run_goes_on_from_it_with_a_new_head(trained: Path, photos: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, other in (("blue", "cool"), ("green", "cool"), ("red", "warm")):
            shutil.copytree(photos / part / name, tmp_path / "two" / part / other / name)
    finetune(trained, tmp_path / "two", tmp_path / "run", "--policy", "head", "--epochs", 1)
    loaded, before = trady.load(tmp_path / "run"), trady.load(trained)
    assert loaded.classes == ("cool", "warm")
    config: Any = loaded.model.config
    assert config.id2label == {0: "cool", 1: "warm"}
    old, new = before.model.state_dict(), loaded.model.state_dict()
    assert new["classifier.weight"].shape == (2, 24)
    assert all(torch.equal(new[name], old[name]) for name in old if not name.startswith("classifier."))


def test_weights_that_are_tied_are_stored_once_and_read_by_from_pretrained(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    folder = RunFolder(tmp_path)
    folder.write_model(all_weights(model), None)
    (tmp_path / "config.json").write_text(json.dumps(configuration(model, ())))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert folder.tied(folder.model) == {"lm_head.weight": "transformer.wte.weight"}
    assert again.lm_head.weight is again.transformer.wte.weight
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_configuration_of_another_model_is_not_replaced(photos: Path, tmp_path: Path) -> None:
    data = trady.load_data(photos, image_size=SIZE)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StateError, match=r"holds config.json of another model.*name another folder"):
        trady.finetune(
            vit(num_labels=3), data.train, data.evaluation, policy="full", epochs=1, out=tmp_path, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"
