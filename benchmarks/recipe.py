"""Does the default recipe hold without a sweep? Head, TraDy and full fine-tuning at one rate, on three networks.

``python -m benchmarks.recipe`` trains each network on CIFAR-10 with :func:`trady.finetune`'s own defaults; with
``--rates`` it also shows how far the rate can be moved before training breaks. ``--optimizer all`` compares every
optimizer of the command line, each at its own default rate, with plain SGD.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

import trady
from benchmarks import options
from benchmarks.backbones import load_backbone
from trady.training.data.datasets import CENTERED
from trady.training.data.load import load_data
from trady.training.models.load import image_format, load_model
from trady.training.run import finetune

#: The paper's smallest budget for its two backbones; for EfficientNet-Lite0 the same share of its elements.
BUDGETS = {"mbv2-w0.35": "elements:27946", "mcunet-5fps": "elements:27946", "efficientnet-lite0": "elements:280000"}
METHODS = ("head", "trady", "full")

#: An optimizer with its momentum, where it is given any: ``sgd+0.9``.
OPTIMIZERS = ("sgd", "sgd+0.9", "adam", "adamw", "sgd-in-backward", "sgd-in-backward+0.9", "adamw-in-backward")


def accuracy(
    name: str, method: str, optimizer: str, source: str, arguments: argparse.Namespace, lr: float | None, seed: int
) -> tuple[float, float]:
    """Train once; return the last accuracy and the seconds it took (0 if the guard stopped it)."""
    lite = name == "efficientnet-lite0"
    data = load_data(
        source,
        image_size=arguments.size,
        limit=(arguments.images, 2000),
        normalization=image_format(name)[0] if lite else CENTERED,
        seed=seed,
    )
    classes = len(data.classes)
    model = (
        load_model(name, classes, seed=seed).model
        if lite
        else load_backbone(name, options.models_folder(arguments.models), classes)
    )
    updates, _, momentum = optimizer.partition("+")
    try:
        result = finetune(
            model,
            data.train,
            data.evaluation,
            budget=BUDGETS[name] if method not in ("head", "full") else None,
            epochs=arguments.epochs,
            out=None,
            policy=method,
            seed=seed,
            progress=False,
            optimizer=updates,
            momentum=float(momentum or 0),
            lr=lr,
        )
    except trady.TrainingError:
        return 0.0, 0.0
    return result.accuracy, result.seconds


def run(arguments: Sequence[str] | None = None) -> int:
    """Train everything that was asked for and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__)
    options.add_models(parser)
    options.add_json(parser)
    parser.add_argument("--model", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), metavar="NAME")
    parser.add_argument("--method", nargs="+", default=list(METHODS), metavar="POLICY", help="head, trady, full, …")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=[*OPTIMIZERS, "all"],
        default=["sgd"],
        metavar="NAME",
        help=f"with a momentum where it is not 0: {', '.join(OPTIMIZERS)}, or all (default: sgd)",
    )
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="rates to try (default: the recipe's)")
    parser.add_argument("--data", nargs="+", help="data sets (default: data/cifar10-12k.npz beside the models' folder)")
    parser.add_argument("--images", type=int, default=2000, help="training images (default: 2000)")
    parser.add_argument("--size", type=int, default=96, help="their height and width (default: 96)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args(arguments)
    chosen.data = chosen.data or [str(options.models_folder(chosen.models).parent / "data" / "cifar10-12k.npz")]
    for source in chosen.data:
        if not Path(source).exists() and source != "fashion-mnist":
            parser.error(f"no data set at {source}; name one with --data, e.g. --data fashion-mnist")
    optimizers = OPTIMIZERS if "all" in chosen.optimizer else chosen.optimizer
    table = Table(title=f"{chosen.images} images, {chosen.size} px, {chosen.epochs} epochs")
    words = ("network", "data", "method", "optimizer")
    for column in (*words, "rate", "accuracy", "seconds"):
        table.add_column(column, justify="left" if column in words else "right")
    figures = []
    for name, source, method, optimizer in product(chosen.model, chosen.data, chosen.method, optimizers):
        for lr in chosen.rates or [None]:
            runs = [accuracy(name, method, optimizer, source, chosen, lr, seed) for seed in range(chosen.seeds)]
            row = {
                "network": name,
                "data": Path(source).stem,
                "method": method,
                "optimizer": optimizer,
                "rate": lr,
                "accuracy": statistics.mean(r[0] for r in runs),
                "accuracies": [r[0] for r in runs],
                "seconds": statistics.median(r[1] for r in runs),
            }
            figures.append(row)
            Console(stderr=True, soft_wrap=True).print(row)
            table.add_row(
                *(str(row[word]) for word in words),
                "default" if lr is None else f"{lr:g}",
                "stopped" if not all(r[0] for r in runs) else f"{row['accuracy']:.1%}",
                f"{row['seconds']:.0f}",
            )
    Console(width=100).print(table)
    options.write_json(chosen.json, {"machine": options.machine(), "rows": figures})
    return 0


if __name__ == "__main__":
    options.main(run)
