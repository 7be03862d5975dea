"""Backbones of the benchmarks: networks from a file that describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trady
from benchmarks import options
from benchmarks.backbones import Backbone, load_backbone, load_images, top1
from tests.small_workloads import architecture


def noise(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_backbone_is_the_network_its_architecture_file_describes(models: Path) -> None:
    model = load_backbone("tiny", models)
    weights = model.state_dict()
    assert {"stem.conv.weight", "blocks.0.depthwise.bn.running_var", "classifier.bias"} <= set(weights)

    def conv(x: Tensor, name: str, relu: bool = True, **geometry: Any) -> Tensor:
        y = nn.functional.conv2d(x, weights[f"{name}.conv.weight"], **geometry)
        mean, var, scale, shift = (weights[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        y = nn.functional.batch_norm(y, mean, var, scale, shift, eps=1e-5)
        return y.clamp(0, 6) if relu else y

    x = conv(noise(), "stem", stride=2, padding=1)
    y = conv(conv(x, "blocks.0.expand"), "blocks.0.depthwise", padding=1, groups=8)
    features = (x + conv(y, "blocks.0.project", relu=False)).mean((2, 3))
    expected = features @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(noise()), expected)


def test_new_classifier_leaves_the_other_weights_alone(models: Path) -> None:
    old, new = load_backbone("tiny", models).state_dict(), load_backbone("tiny", models, num_classes=3).state_dict()
    assert new["classifier.weight"].shape == (3, 4)
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("classifier."))


def test_feature_mix_comes_before_pooling() -> None:
    model = Backbone(architecture(mix=True)).eval()
    assert model(noise()).shape == (2, 5)
    assert model.get_parameter("feature_mix.conv.weight").shape == (6, 4, 1, 1)


def test_missing_backbone_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(trady.ModelError, match=r"tiny\.json is missing.*--models DIR"):
        load_backbone("tiny", tmp_path)


def test_weights_of_another_architecture_are_refused(models: Path) -> None:
    described = architecture()
    described["blocks"] *= 2
    (models / "tiny.json").write_text(json.dumps(described))
    with pytest.raises(trady.ModelError, match=r"does not fit.*blocks\.1\.expand\.conv\.weight"):
        load_backbone("tiny", models)


def test_models_are_looked_for_in_the_option_then_the_environment_then_beside_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRADY_MODELS", raising=False)
    repository = Path(options.__file__).resolve().parent.parent
    assert options.models_folder(None) == repository.parent / "shared" / "models"
    monkeypatch.setenv("TRADY_MODELS", "elsewhere")
    assert options.models_folder(None) == Path("elsewhere")
    assert options.models_folder("here") == Path("here")


def test_top1_counts_the_images_whose_label_scores_highest(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=np.array([[[[0, 0, 255]]], [[[255, 0, 0]]], [[[0, 255, 0]]]], np.uint8), labels=[2, 0, 0])
    images, labels = load_images(path)
    assert images.shape == (3, 3, 1, 1)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert top1(nn.Flatten(), images, labels) == pytest.approx(2 / 3)
