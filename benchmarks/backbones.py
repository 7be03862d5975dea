"""The two backbones of the TraDy paper (arXiv 2510.19675): MobileNetV2-w0.35 and MCUNet-5fps.

A folder holds ``<name>.json``, the architecture (stem, blocks of expand / depthwise / project, an optional
feature mix, the classifier), and ``<name>.safetensors``, its ImageNet weights. Run as a module, it
classifies labelled images with both, to show that the networks are what they should be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.options import add_images, add_models, images_file, main, models_folder
from trady.errors import DataError, ModelError
from trady.training.data.datasets import CENTERED
from trady.training.models.load import LoadedModel

BACKBONES = ("mbv2-w0.35", "mcunet-5fps")

#: Height and width of the images that they were trained on; their pixels lie in [-1, 1].
IMAGE_SIZE = 128

#: Top-1 on 1 000 ImageNet images, as published with the weights.
DOCUMENTED_TOP1 = {"mbv2-w0.35": 0.522, "mcunet-5fps": 0.621}


class ConvLayer(nn.Module):
    """Convolution, batch normalisation and, where the architecture has one, a ReLU6.

    Args:
        layer: One layer of the architecture file.
        epsilon: Of the normalisation.
    """

    def __init__(self, layer: Mapping[str, Any], epsilon: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            layer["in_channels"],
            layer["out_channels"],
            layer["kernel_size"],
            stride=layer["stride"],
            padding=layer["padding"],
            groups=layer["groups"],
            bias=False,
        )
        self.bn = nn.BatchNorm2d(layer["out_channels"], eps=epsilon)
        if layer["activation"] not in (None, "relu6"):
            raise ModelError(f"layer {layer['name']!r} has activation {layer['activation']!r}; known is relu6")
        self.relu6 = nn.ReLU6(inplace=True) if layer["activation"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu6(self.bn(self.conv(x)))
        return y


class Block(nn.Module):
    """An inverted bottleneck: expand, depthwise and project, with a residual connection where shapes agree."""

    def __init__(self, block: Mapping[str, Any], epsilon: float) -> None:
        super().__init__()
        self.residual = bool(block["residual"])
        for layer in block["layers"]:
            self.add_module(layer["name"].rpartition(".")[2], ConvLayer(layer, epsilon))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.children():
            y = layer(y)
        return x + y if self.residual else y


class Backbone(nn.Module):
    """Stem, blocks, an optional feature mix, global average pooling and a linear classifier.

    Images ``[N, 3, 128, 128]`` in [-1, 1] give class scores ``[N, classes]``.

    Args:
        architecture: The architecture file.
        num_classes: Outputs of the classifier; ``None`` takes the architecture's own.
    """

    def __init__(self, architecture: Mapping[str, Any], num_classes: int | None = None) -> None:
        super().__init__()
        epsilon, mix, classifier = (architecture[key] for key in ("bn_eps", "feature_mix", "classifier"))
        self.stem = ConvLayer(architecture["stem"], epsilon)
        self.blocks = nn.ModuleList(Block(block, epsilon) for block in architecture["blocks"])
        self.feature_mix = nn.Identity() if mix is None else ConvLayer(mix, epsilon)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(classifier["in_features"], num_classes or classifier["out_features"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:  # not blocks(x): that call would keep the stem's output until it returns
            x = block(x)
        scores: Tensor = self.classifier(self.pool(self.feature_mix(x)).flatten(1))
        return scores


def load_backbone(name: str, folder: Path, num_classes: int | None = None) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        name: The files' name without their ending.
        folder: Where the files lie.
        num_classes: Outputs of a new, untrained classifier; ``None`` keeps the trained one.

    Raises:
        ModelError: A file is missing or does not fit the other.

    """
    try:
        architecture = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        weights = load_file(folder / f"{name}.safetensors")
    except FileNotFoundError as error:
        raise ModelError(
            f"{error.filename} is missing: type --models DIR, or set TRADY_MODELS, to name the folder that holds "
            f"{name}.json and {name}.safetensors"
        ) from error
    model = Backbone(architecture, num_classes)
    if num_classes is not None:
        weights = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
    found = model.load_state_dict(weights, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if num_classes is not None:
        missing = [key for key in missing if not key.startswith("classifier.")]
    if missing or found.unexpected_keys:
        raise ModelError(
            f"{name}.safetensors does not fit {name}.json: missing {missing}, unexpected {found.unexpected_keys}"
        )
    return model.eval()


def mbv2(num_classes: int) -> LoadedModel:
    """MobileNetV2-w0.35, for ``trady finetune benchmarks.backbones:mbv2``."""
    return LoadedModel(load_backbone("mbv2-w0.35", models_folder(None), num_classes), CENTERED, IMAGE_SIZE)


def mcunet(num_classes: int) -> LoadedModel:
    """MCUNet-5fps, for ``trady finetune benchmarks.backbones:mcunet``."""
    return LoadedModel(load_backbone("mcunet-5fps", models_folder(None), num_classes), CENTERED, IMAGE_SIZE)


def load_images(path: Path) -> tuple[Tensor, Tensor]:
    """Read ``images`` [N, H, W, 3] (uint8) and ``labels`` [N] from an ``.npz`` file.

    Returns:
        Pixels [N, 3, H, W] in [-1, 1] and labels (int64).

    Raises:
        DataError: The file is missing or lacks one of the two.

    """
    try:
        with np.load(path, allow_pickle=False) as data:
            images, labels = data["images"], data["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: {error}; it must be an .npz file with images and labels") from error
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(), torch.from_numpy(labels).long()


def batches(images: Tensor, labels: Tensor, size: int = 50) -> list[tuple[Tensor, Tensor]]:
    """Cut images and labels into batches."""
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, len(labels), size)]


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose highest score is that of their label."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(images, labels))
    return right / len(labels)


def run(arguments: Sequence[str] | None = None) -> int:
    """Classify labelled ImageNet images with both backbones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=__doc__)
    add_models(parser)
    add_images(parser)
    options = parser.parse_args(arguments)
    folder = models_folder(options.models)
    images, labels = load_images(images_file(options.images, folder))
    table = Table("backbone", "top-1", "documented", title=f"{len(labels)} ImageNet images", title_justify="left")
    for name in BACKBONES:
        model = load_backbone(name, folder)
        if images.shape[-1] != IMAGE_SIZE:
            images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear", antialias=True)
        table.add_row(name, f"{top1(model, images, labels):.1%}", f"{DOCUMENTED_TOP1[name]:.1%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    main(run)
