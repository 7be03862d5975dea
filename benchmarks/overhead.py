"""What planning and drawing take, beside an epoch of a real data set.

A model is planned once, channels are drawn once an epoch. An epoch is counted as the steps that the workload's batch
takes through CIFAR-10 (50 000 images), SST-2 (67 349 sentences) or WikiText-2 (2 088 628 tokens). Timings gate nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.methods import trady_step
from benchmarks.options import add_json, add_models, add_workloads, console_for, main, models_folder, write_json
from benchmarks.shares import budget_of
from benchmarks.speed import WARM_UP_ROUNDS, add_timing, timing
from benchmarks.workloads import WORKLOADS, Workload

IMAGES, SENTENCES, TOKENS = 50_000, 67_349, 2_088_628

#: Share of an epoch that planning and drawing may take.
AIM = 0.01


@dataclass(frozen=True)
class Overhead:
    """Medians of one workload, in seconds.

    Attributes:
        plan_seconds: Of ``trady.prepare``.
        draw_seconds: Of ``tuner.resample``.
        step_seconds: Of a training step.
        steps: Of an epoch.
    """

    plan_seconds: float
    draw_seconds: float
    step_seconds: float
    steps: int

    @property
    def share(self) -> float:
        """Planning and one draw over one epoch."""
        return (self.plan_seconds + self.draw_seconds) / (self.steps * self.step_seconds)


def steps_of_an_epoch(batch: Any) -> int:
    """Return how many such batches the data set of its kind has."""
    if isinstance(batch, torch.Tensor):
        return -(-IMAGES // len(batch))
    samples, length = (int(size) for size in batch["input_ids"].shape)
    return -(-TOKENS // (samples * length)) if "labels" in batch else -(-SENTENCES // samples)


def measure(workload: Workload, models: Path, rounds: int, clock: Callable[[], float]) -> Overhead:
    """Plan, draw and step, each this often; every plan is that of a model which is new to trady."""
    task = workload.make(models)
    workload = replace(workload, budget=workload.budget or budget_of(workload.policy, task.model, task.batch))

    def seconds(run: Callable[[], object]) -> float:
        started = clock()
        run()
        return clock() - started

    plans = [seconds(partial(workload.arm, workload.make(models))) for _ in range(rounds)]
    with trady_step(workload, task) as step:
        for _ in range(WARM_UP_ROUNDS):
            step.run()
        steps = [seconds(step.run) for _ in range(rounds)]
        draws = [seconds(partial(step.tuner.resample, epoch)) for epoch in range(1, rounds + 1)]
    return Overhead(median(plans), median(draws), median(steps), steps_of_an_epoch(task.batch))


def as_table(found: Mapping[str, Overhead]) -> Table:
    """Return the table that a person reads."""
    table = Table(title="Planning once and drawing once an epoch, beside the steps of an epoch", title_justify="left")
    table.add_column("workload")
    for column in ("plan", "draw", "step", "plan ÷ step", "steps an epoch", "share of an epoch"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        times = (f"{seconds * 1e3:.0f} ms" for seconds in (row.plan_seconds, row.draw_seconds, row.step_seconds))
        over = f"{row.plan_seconds / row.step_seconds:.1f}"
        table.add_row(name, *times, over, f"{row.steps:,}".replace(",", " "), f"{row.share:.2%}")
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    add_workloads(parser, WORKLOADS)
    add_timing(parser, repeats=3)
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    rounds, clock = timing(options)
    models = models_folder(options.models)
    found = {
        name: measure(WORKLOADS[name], models, rounds, clock)
        for name in track(options.workload, console=Console(stderr=True), transient=True)
    }
    console = console_for(options.json)
    console.print(as_table(found))
    worst = max(found, key=lambda name: found[name].share)
    word = "[green]met[/]" if found[worst].share <= AIM else "[yellow]missed[/]"
    console.print(f"{word}  aim {AIM:.0%} of an epoch: {found[worst].share:.2%} at most ({worst})")
    figures = {name: {**asdict(row), "share": row.share} for name, row in found.items()}
    write_json(options.json, {"clock": options.clock, "workloads": figures})
    return 0


if __name__ == "__main__":
    main(run)
