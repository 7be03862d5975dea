"""Layer RGN (equation 8 of arXiv 2510.19675) on the paper's backbones: K, shares, and how far rankings agree.

For every backbone, task, seed and mode of batch normalisation: the number of layers that hold 97 % of the layer RGN
(the paper has 35 of MobileNetV2-w0.35's and 27 of MCUNet's), what the first quarter and half of the layers hold (figure
10: over 50 % and over 90 %), Spearman correlations between tasks, seeds and modes, and that of the ranking which a run
learns online, from the channels that it trains, with the one measured from all gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

import trady
from benchmarks import options
from benchmarks.backbones import load_backbone
from benchmarks.priors import held_by
from benchmarks.tasks import seeded
from trady.ranking.ranking import LayerRanking
from trady.training.data.datasets import ImageDataset
from trady.training.data.load import load_data

#: Network: the paper's K, and the smallest budget of the published schemes.
NETWORKS = {"mbv2-w0.35": (35, "elements:27946"), "mcunet-5fps": (27, "elements:15936")}
NORMS: tuple[Literal["frozen", "batch"], ...] = ("frozen", "batch")

IMAGE_SIZE, BATCH, BATCHES = 128, 32, 32
#: Steps after which a ranking that is learnt online is looked at: two epochs of 2 000 images.
ONLINE_STEPS = 126

Key = tuple[str, str, int, str]


def network(name: str, models: Path) -> nn.Module:
    """Return a backbone with a new head of ten classes."""
    return seeded(lambda: load_backbone(name, models, 10)).train()


def batches_of(data: ImageDataset, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches, from the start again where the data ends."""
    for number in range(count):
        start = number * BATCH % (len(data) - BATCH + 1)
        yield data.batch(range(start, start + BATCH))


def learnt_online(model: nn.Module, data: ImageDataset, budget: str, seed: int, lr: float) -> LayerRanking:
    """Train as ``trady.finetune`` does, and return the ranking that was learnt on the way."""
    first, _ = next(batches_of(data, 1))
    tuner = trady.prepare(model, first, budget=budget, ranking="online", seed=seed)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=lr))
    for inputs, labels in batches_of(data, ONLINE_STEPS):
        F.cross_entropy(model(inputs), labels).backward()
        tuner.clip_gradients(0.1, 2.0)
        optimizer.step()
        optimizer.zero_grad()
    found = tuner.ranking
    tuner.finish()
    assert found is not None
    return found


def measure(chosen: argparse.Namespace, models: Path) -> tuple[dict[Key, LayerRanking], list[dict[str, Any]]]:
    """Measure every ranking, and the online ones."""
    sources = {"cifar10": str(models.parent / "data" / "cifar10-12k.npz"), "fashion-mnist": "fashion-mnist"}
    found: dict[Key, LayerRanking] = {}
    online = []
    for name in chosen.network:
        for task in chosen.task:
            for seed in range(chosen.seeds):
                data = load_data(sources[task], image_size=IMAGE_SIZE, limit=(BATCH * BATCHES, BATCH), seed=seed).train
                data_batches = list(batches_of(data, chosen.batches))
                for norm in NORMS:
                    ranking = trady.rank(network(name, models), data_batches, F.cross_entropy, norm=norm)
                    found[name, task, seed, norm] = ranking
                if chosen.online:
                    learnt = learnt_online(network(name, models), data, NETWORKS[name][1], seed, lr=0.0)
                    truth = found[name, task, seed, "frozen"]
                    top = set(truth.top())
                    online.append(
                        {
                            "network": name,
                            "task": task,
                            "seed": seed,
                            "spearman": learnt.spearman(truth),
                            "top": len(top),
                            "shared": len(top & set(learnt.top())),
                        }
                    )
    return found, online


def agreement(found: dict[Key, LayerRanking], name: str) -> dict[str, list[float]]:
    """Return the Spearman correlations of pairs that differ in one thing only."""
    pairs: dict[str, list[float]] = {f"tasks, {norm}": [] for norm in NORMS}
    pairs |= {f"seeds, {norm}": [] for norm in NORMS} | {"frozen and batch": []}
    mine = [key for key in found if key[0] == name]
    for one, other in combinations(mine, 2):
        differ = [place for place in range(1, 4) if one[place] != other[place]]
        if len(differ) == 1:
            what = {1: f"tasks, {one[3]}", 2: f"seeds, {one[3]}", 3: "frozen and batch"}[differ[0]]
            pairs[what].append(found[one].spearman(found[other]))
    return {what: values for what, values in pairs.items() if values}


def run(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    options.add_models(parser)
    options.add_json(parser)
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--task", nargs="+", choices=["cifar10", "fashion-mnist"], default=["cifar10", "fashion-mnist"])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the images (default: 3)")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of {BATCH} images (default: {BATCHES})")
    parser.add_argument("--no-online", dest="online", action="store_false", help="leave out the online rankings")
    chosen = parser.parse_args(arguments)
    found, online = measure(chosen, options.models_folder(chosen.models))
    console = options.console_for(chosen.json)
    table = Table(title="Layers that hold 97 % of the layer RGN, and what the first of them hold")
    for column in ("network", "layers", "task", "normalisation", "K", "paper", "first 25 %", "first 50 %"):
        table.add_column(column, justify="left" if column in ("network", "task", "normalisation") else "right")
    for name in chosen.network:
        for task in chosen.task:
            for norm in NORMS:
                rankings = [ranking for key, ranking in found.items() if (*key[:2], key[3]) == (name, task, norm)]
                table.add_row(
                    name, str(len(rankings[0].scores)), task, norm,
                    ", ".join(str(len(ranking.top())) for ranking in rankings), str(NETWORKS[name][0]),
                    *(f"{fmean(held_by(ranking, share) for ranking in rankings):.2f}" for share in (0.25, 0.5)),
                )  # fmt: skip
    console.print(table)
    figures = {name: agreement(found, name) for name in chosen.network}
    for name, pairs in figures.items():
        for what, values in pairs.items():
            console.print(f"{name}: Spearman between {what}: {fmean(values):.3f}, lowest {min(values):.3f}")
    for name in chosen.network:
        if mine := [row for row in online if row["network"] == name]:
            values = [row["spearman"] for row in mine]
            shared = ", ".join(f"{row['shared']} of {row['top']}" for row in mine)
            console.print(
                f"{name}: Spearman between online and measured: {fmean(values):.3f}, lowest {min(values):.3f}"
            )
            console.print(f"{name}: layers of the measured pool in the online one: {shared}")
    rows = [
        {
            **dict(zip(("network", "task", "seed", "norm"), key, strict=True)),
            "k": len(ranking.top()),
            "first_quarter": held_by(ranking, 0.25),
            "first_half": held_by(ranking, 0.5),
        }
        for key, ranking in found.items()
    ]
    options.write_json(chosen.json, {"rows": rows, "agreement": figures, "online": online})
    return 0


if __name__ == "__main__":
    options.main(run)
