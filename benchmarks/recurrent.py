"""Recurrent layers: time and peak of a step that trains a twentieth of the channels, beside full fine-tuning.

An embedding, one ``nn.LSTM`` or ``nn.GRU`` and a classifier of every step; full fine-tuning runs PyTorch's kernels,
whose own workspace no ledger sees. Timings gate nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.methods import Method, full_fine_tuning, trady_step
from benchmarks.options import add_json, console_for, main, write_json
from benchmarks.shares import ShareOfEveryLayer
from benchmarks.speed import add_timing, in_turns, ratio, timing
from benchmarks.tasks import CrossEntropy, Task, seeded
from benchmarks.workloads import Workload
from trady import register_policy

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}
SEQUENCES, VOCABULARY, CLASSES = 16, 1000, 10
SHARE = Fraction(1, 20)


class Tagger(nn.Module):
    """Scores for every token."""

    def __init__(self, cell: Callable[..., nn.RNNBase], features: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, features), nn.Linear(features, CLASSES)
        self.cell = cell(features, features, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Score the tokens of [sequences, steps]: [sequences · steps, classes]."""
        scores: Tensor = self.head(self.cell(self.embedding(ids))[0]).flatten(0, 1)
        return scores


@dataclass(frozen=True)
class Found:
    """What came of one layer.

    Attributes:
        over_full: Time of a step over that of full fine-tuning; the median over rounds.
        seconds: Of a step; the median.
        peak_bytes: Of a step, weights included.
        full_peak_bytes: Of full fine-tuning.
    """

    over_full: float
    seconds: float
    peak_bytes: int
    full_peak_bytes: int


def workload(cell: str, steps: int, features: int) -> Workload:
    """Describe one layer."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, steps), generator=random)
    labels = torch.randint(0, CLASSES, (SEQUENCES * steps,), generator=random)

    def make(_: Path) -> Task:
        return Task(seeded(partial(Tagger, CELLS[cell], features)), ids, CrossEntropy(labels))

    policy = register_policy(ShareOfEveryLayer(SHARE), replace=True).name
    return Workload(f"{cell}, {steps} x {features}", f"{steps} steps, {features} features", make, policy)


def measure(one: Workload, rounds: int, clock: Callable[[], float]) -> Found:
    """Time the two in turns, and account for a step of each."""
    methods: dict[str, Method] = {"full": full_fine_tuning, "trady": trady_step}
    with ExitStack() as stack:
        both = {name: stack.enter_context(method(one, one.make(Path()))) for name, method in methods.items()}
        seconds = in_turns({name: step.run for name, step in both.items()}, rounds, clock)
        peaks = {name: step.ledger().peak_bytes for name, step in both.items()}
    return Found(ratio(seconds, "trady", "full"), median(seconds["trady"]), peaks["trady"], peaks["full"])


def as_table(found: Mapping[str, Found]) -> Table:
    """Return the table that a person reads."""
    table = Table(title=f"A step of {SEQUENCES} sequences, weights in the peak", title_justify="left")
    table.add_column("layer, steps x features")
    for column in ("full fine-tuning", "TraDy", "step", "step ÷ full"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        peaks = (f"{bytes_ / 2**20:.1f} MiB" for bytes_ in (row.full_peak_bytes, row.peak_bytes))
        table.add_row(name, *peaks, f"{row.seconds * 1e3:.1f} ms", f"{row.over_full:.2f} x")
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent", description=__doc__)
    for name, kind, default in (("cell", str, list(CELLS)), ("steps", int, [64, 128]), ("features", int, [64, 256])):
        known: dict[str, Any] = {"choices": list(CELLS)} if name == "cell" else {"metavar": "N"}
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=default, help=f"default: {default}", **known)
    add_timing(parser, repeats=9)
    add_json(parser)
    options = parser.parse_args(arguments)
    rounds, clock = timing(options)
    every = [workload(*sizes) for sizes in product(options.cell, options.steps, options.features)]
    found = {
        one.name: measure(one, rounds, clock) for one in track(every, console=Console(stderr=True), transient=True)
    }
    console_for(options.json).print(as_table(found))
    write_json(options.json, {"clock": options.clock, "layers": {name: asdict(row) for name, row in found.items()}})
    return 0


if __name__ == "__main__":
    main(run)
