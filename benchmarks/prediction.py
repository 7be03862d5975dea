"""Peaks told beforehand against peaks measured: random budgets of every kind, and whether peak budgets are kept.

Every trial plans for a random budget, arms the model, runs a training step and compares. A peak budget lies between
the minimum and the measured peak of full fine-tuning; budgets in elements and in bytes of the update lie
between the cheapest channel and all channels, spread evenly over orders of magnitude.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_map

import trady
from benchmarks.memory import Verdict
from benchmarks.methods import RATE, full_fine_tuning
from benchmarks.options import add_json, add_models, add_workloads, console_for, main, models_folder, write_json
from benchmarks.tasks import CrossEntropy, Task
from benchmarks.workloads import WORKLOADS, Workload
from trady.model.batch import Batch
from trady.planning.budget import Budget, InfeasibleBudgetError
from trady.planning.request import Request
from trady.planning.scopes import ELEMENTS, PEAK, UPDATE, BudgetScope
from trady.report.units import format_bytes
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.training.optimizers import OptimizerFactory, memory_of
from trady.tuner.tuner import Tuner

#: The kinds of budget that tensors decide; ``benchmarks.process`` has that of the process.
PREDICTED = (PEAK, UPDATE, ELEMENTS)

#: How far a prediction may lie from the measured peak.
MOST_ERROR = 0.03

#: The part of a batch that ``--small`` leaves.
SMALL = 4

#: What trains, by the name that ``--optimizer`` takes.
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=RATE),
}


@dataclass(frozen=True)
class Trial:
    """One budget on one workload.

    Attributes:
        workload: Its name.
        budget: As text.
        seed: Of the channels drawn.
        channels: Input channels that trained.
        recomputed: SegmentsByMode that were recomputed.
        predicted_bytes: Peak of a step, before there was one.
        measured_bytes: Peak of the step.
        budget_bytes: What a ``peak:`` budget allows; ``None`` for other budgets.
    """

    workload: str
    budget: str
    seed: int
    channels: int
    recomputed: int
    predicted_bytes: int
    measured_bytes: int
    budget_bytes: int | None

    @property
    def error(self) -> float:
        """Prediction over measurement, less one: negative where the prediction is too low."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def kept(self) -> bool:
        """Whether the step stayed inside a peak budget."""
        return self.budget_bytes is None or self.measured_bytes <= self.budget_bytes


def reduced(task: Task) -> Task:
    """A quarter of the batch, two samples at least."""
    samples = max(2, Batch.of(task.batch).samples // SMALL)
    # Copied: a view would keep the memory of the whole batch.
    part = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, Batch.of(task.batch).chunk(0, samples).inputs)
    computes_loss = isinstance(task.batch, Mapping) and "labels" in task.batch
    return Task(task.model, part, task.loss if computes_loss else CrossEntropy(torch.zeros(samples, dtype=torch.long)))


def limits(workload: Workload, task: Task, optimizer: str = "sgd") -> dict[BudgetScope, tuple[int, int]]:
    """The least and the largest budget that make a difference, for every kind of budget."""
    with full_fine_tuning(workload, task) as step:
        full = step.ledger().peak_bytes
    everything = trady.plan(task.model, task.batch, policy="full").cost
    most = {PEAK: full, UPDATE: everything.update_bytes, ELEMENTS: everything.elements}
    return {scope: (least(task, scope, optimizer), highest) for scope, highest in most.items()}


def least(task: Task, scope: BudgetScope, optimizer: str) -> int:
    """The least budget that a step is possible in."""
    try:
        Request(budget=Budget(scope, 1)).decide(task.model, task.batch, explain=False, optimizer=taken(task, optimizer))
    except InfeasibleBudgetError as error:
        return error.least_amount
    return 1


def taken(task: Task, optimizer: str) -> OptimizerMemory:
    """What an optimizer takes, before it is there."""
    return memory_of(OPTIMIZERS[optimizer], next(task.model.parameters()).device)


def draw_budget(scope: BudgetScope, low: int, high: int, random: random.Random) -> Budget:
    """Draw a budget: peaks evenly, others evenly over orders of magnitude."""
    high = max(low, high)
    if scope.bounds_peak:
        return Budget(scope, random.randint(low, high))
    return Budget(scope, min(high, max(low, round(math.exp(random.uniform(math.log(low), math.log(high)))))))


def attempt(name: str, task: Task, budget: Budget, seed: int, chosen: str = "sgd") -> Trial:
    """Plan, predict, run a step, and measure it; the second one where the first makes the optimizer's state."""
    request = Request(budget=budget, seed=seed)
    decision = request.decide(task.model, task.batch, optimizer=taken(task, chosen))
    tuner = Tuner(decision)
    try:
        predicted = sum(decision.spending(decision.start).peak_parts(tuner.selection).values())
        task.model.train()
        optimizer = tuner.attach(OPTIMIZERS[chosen](tuner.parameters()))

        def step() -> None:
            task.run().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        channels, recomputed = tuner.selection.count, len(decision.start.recomputation.names)
        measured = max(tuner.ledger(step, inference=False).peak_bytes for _ in range(1 if chosen == "sgd" else 2))
    finally:
        tuner.finish()
    return Trial(name, str(budget), seed, channels, recomputed, predicted, measured, budget.peak_bytes)


def trials(
    workload: Workload, task: Task, budgets: int, draws: int, seed: int, progress: Console, optimizer: str = "sgd"
) -> list[Trial]:
    """Try budgets of every kind in turn, then further peak budgets."""
    random_ = random.Random(f"{seed} {workload.name}")
    if not budgets + draws:
        return []
    bounds = limits(workload, task, optimizer)
    scopes = [list(PREDICTED)[i % len(PREDICTED)] for i in range(budgets)] + [PEAK] * draws
    found = []
    for number, scope in enumerate(scopes, 1):
        started = time.perf_counter()
        budget = draw_budget(scope, *bounds[scope], random_)
        trial = attempt(workload.name, task, budget, random_.randrange(2**31), optimizer)
        found.append(trial)
        peaks = f"predicted {format_bytes(trial.predicted_bytes)}, measured {format_bytes(trial.measured_bytes)}"
        progress.print(
            f"{workload.name} {number}/{len(scopes)}  {budget}: {peaks} ({trial.error:+.2%}), "
            f"{time.perf_counter() - started:.0f} s",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    return found


def judge(found: Sequence[Trial]) -> list[Verdict]:
    """Hold the trials against what is promised."""
    errors = [trial.error for trial in found]
    worst = f"{min(errors):+.2%} to {max(errors):+.2%} in {len(errors)} steps"
    close = all(abs(error) <= MOST_ERROR for error in errors)
    peaks = [trial for trial in found if trial.budget_bytes is not None]
    kept = sum(trial.kept for trial in peaks)
    return [
        Verdict(f"prediction within {MOST_ERROR:.0%} of the measured peak", worst, close),
        Verdict("measured peak never above a peak budget", f"{kept} of {len(peaks)} kept", kept == len(peaks)),
    ]


def as_table(found: Sequence[Trial]) -> Table:
    """Return a row for every workload and kind of budget."""
    table = Table(title="Predicted over measured peak of a training step", title_justify="left")
    for column in ("workload", "budgets"):
        table.add_column(column)
    for column in ("steps", "lowest", "mean", "highest", "inside the budget", "fullest"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(trial.workload for trial in found):
        for scope in PREDICTED:
            group = [t for t in found if t.workload == name and t.budget.startswith(f"{scope}:")]
            if not group:
                continue
            errors = [trial.error for trial in group]
            spread = (min(errors), sum(errors) / len(errors), max(errors))
            used = [t.measured_bytes / t.budget_bytes for t in group if t.budget_bytes is not None]
            inside = [f"{sum(t.kept for t in group)} of {len(group)}", f"{max(used):.1%}"] if used else ["", ""]
            table.add_row(name, str(scope), str(len(group)), *(f"{error:+.2%}" for error in spread), *inside)
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Try, print, and return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    add_workloads(parser, WORKLOADS)
    parser.add_argument("--budgets", type=int, default=20, help="random budgets of all kinds a workload (default: 20)")
    parser.add_argument("--draws", type=int, default=50, help="peak budgets more, over the workloads (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of budgets and channels (default: 0)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="what trains (default: sgd)")
    parser.add_argument("--small", action="store_true", help=f"steps of 1/{SMALL} of each batch, which take less time")
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    if options.budgets < 0 or options.draws < 0 or not options.budgets + options.draws:
        parser.error("--budgets and --draws are numbers of budgets; one at least must be tried")
    console, progress = console_for(options.json), Console(stderr=True)
    chooser = random.Random(options.seed)
    drawn = [chooser.choice(options.workload) for _ in range(options.draws)]
    found: list[Trial] = []
    for name in options.workload:
        workload, draws = WORKLOADS[name], drawn.count(name)
        task = workload.make(models_folder(options.models))
        task = reduced(task) if options.small else task
        found += trials(workload, task, options.budgets, draws, options.seed, progress, options.optimizer)
    console.print(as_table(found))
    verdicts = judge(found)
    for verdict in verdicts:
        word = "[green]pass[/]" if verdict.met else "[red]FAIL[/]"
        console.print(f"{word}  {verdict.bar}: {verdict.measured}")
    figures: dict[str, Any] = {
        "small": options.small,
        "optimizer": options.optimizer,
        "seed": options.seed,
        "trials": [{**asdict(trial), "error": trial.error, "kept": trial.kept} for trial in found],
        "bars": [asdict(verdict) for verdict in verdicts],
    }
    write_json(options.json, figures)
    return int(not all(verdict.met for verdict in verdicts))


if __name__ == "__main__":
    main(run)
