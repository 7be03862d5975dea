"""A BERT on sentences: MiniLM-L6 on SST-2, head, TraDy at 5 % of full fine-tuning's update memory, and full.

``python -m benchmarks.paper.sst2``: each run is resumed where it ended; one that is done is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.data import default_collate

import trady
from benchmarks import options
from benchmarks.text import Sentences, pretrained_minilm, read_sentences
from trady.report.units import format_bytes
from trady.training.run import finetune
from trady.training.run_folder import RunFolder

FOLDER = Path(__file__).parent / "results" / "sst2"

#: Of what full fine-tuning adds to a frozen forward and backward pass.
SHARE = 0.05
BATCH = 32

#: Plain SGD hardly moves a BERT in a few hundred steps, so all have AdamW, and its states count in the budget. Rates
#: were chosen on the validation sentences. In parts of a batch, with the same gradient, the budget holds more channels.
#: The shipped ranking of MiniLM was measured on these very sentences; ``trady online`` learns its own.
_CHANNELS: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3, "draws_per_epoch": 4, "micro_batch": 8}
RECIPES: dict[str, dict[str, Any]] = {
    "head": {"optimizer": "adamw", "lr": 3e-3},
    "trady": _CHANNELS,
    "trady+": _CHANNELS,
    "trady online": {**_CHANNELS, "ranking": "online"},
    "full": {"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0},
}


def update_bytes(train: Sentences) -> int:
    """What full fine-tuning by plain SGD adds to a frozen forward and backward pass."""
    inputs = {key: value for key, value in default_collate([train[i] for i in range(BATCH)]).items() if key != "labels"}
    return trady.plan(pretrained_minilm({}), inputs, policy="full").cost.update_bytes


@dataclass(frozen=True)
class Experiment:
    """All runs share it.

    Attributes:
        train: Sentences to train on.
        evaluation: Sentences to evaluate on.
        budget: Of the policies that take one.
        epochs: Passes over the training sentences.
    """

    train: Sentences
    evaluation: Sentences
    budget: str
    epochs: int

    def folder(self, method: str, seed: int | str) -> str:
        """Name a run by all that decides it."""
        sizes = (*self.train.ids.shape, *self.evaluation.ids.shape)
        decides = json.dumps([RECIPES[method], self.budget, self.epochs, sizes])
        return f"{method.replace(' ', '-')}-s{seed}-{hashlib.sha256(decides.encode()).hexdigest()[:8]}"

    def run(self, method: str, seed: int) -> None:
        """Train once, or go on with it."""
        folder = RunFolder(FOLDER / self.folder(method, seed))
        if folder.result.exists():
            return
        torch.manual_seed(seed)
        finetune(
            pretrained_minilm({}),
            self.train,
            self.evaluation,
            budget=None if method in ("head", "full") else self.budget,
            policy=method.removesuffix(" online"),
            epochs=self.epochs,
            batch_size=BATCH,
            seed=seed,
            out=folder.path,
            resume=True,
            keep_best=False,
            **RECIPES[method],
        )
        folder.model.unlink()
        folder.delta.unlink(missing_ok=True)

    def row(self, method: str) -> dict[str, Any] | None:
        """Summarise the runs that are done."""
        paths = sorted(FOLDER.glob(f"{self.folder(method, '*')}/result.json"))
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if not results:
            return None
        accuracies = [result["accuracy"] for result in results]
        return {
            "method": method,
            "accuracy": statistics.fmean(accuracies),
            "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "accuracies": accuracies,
            "peak_bytes": max(result["peak_bytes"] for result in results),
            "seconds": statistics.median(result["seconds"] for result in results),
        }


def run(arguments: Sequence[str] | None = None) -> int:
    """Run what is left and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.sst2", description=__doc__)
    options.add_models(parser)
    options.add_json(parser)
    parser.add_argument("--data", type=Path, help="folder of train.tsv and test.tsv (default: data/sst2 beside models)")
    parser.add_argument("--method", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--length", type=int, default=48, help="tokens of a sentence (default: 48)")
    parser.add_argument("--sentences", type=int, help="train on the first so many only")
    chosen = parser.parse_args(arguments)
    data = chosen.data or options.models_folder(chosen.models).parent / "data" / "sst2"
    train = read_sentences(data / "train.tsv", chosen.length, chosen.sentences)
    evaluation = read_sentences(data / "test.tsv", chosen.length, None)
    full = update_bytes(train)
    budget = f"update:{int(SHARE * full)} B"
    experiment = Experiment(train, evaluation, budget, chosen.epochs)
    for seed in range(chosen.seeds):
        for method in chosen.method:
            experiment.run(method, seed)
    rows = [row for method in chosen.method if (row := experiment.row(method)) is not None]
    table = Table(title=f"MiniLM-L6 on SST-2; full fine-tuning adds {format_bytes(full)}, TraDy's budget is {budget}")
    for name in ("method", "seeds", "accuracy", "deviation", "peak", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            str(len(row["accuracies"])),
            f"{row['accuracy']:.2%}",
            "–" if row["deviation"] is None else f"{row['deviation']:.2%}",
            format_bytes(row["peak_bytes"]),
            f"{row['seconds']:.0f}",
        )
    options.console_for(chosen.json).print(table)
    options.write_json(chosen.json, {"full_update_bytes": full, "budget": budget, "rows": rows})
    return 0


if __name__ == "__main__":
    options.main(run)
