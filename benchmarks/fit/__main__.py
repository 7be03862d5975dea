"""What ``trady fit`` tells beforehand against the ledger of the real step, for every method and workload.

A method is applied to the workload's model and steps with AdamW; the ledger accounts for the second step, in which the
optimizer's state is there. ``--llama`` instead asks about the shape of Llama-3.2-3B, from its configuration alone, and
holds the figures of full fine-tuning and LoRA beside those that peft's method comparison has measured on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import trady
from benchmarks.fit import llama
from benchmarks.memory import Verdict
from benchmarks.options import add_json, add_models, add_workloads, console_for, main, models_folder, write_json
from benchmarks.prediction import MOST_ERROR, reduced
from benchmarks.tasks import Task
from benchmarks.workloads import WORKLOADS, Workload
from trady.estimates.methods import METHODS, TRADY, Settings, read_method
from trady.estimates.report import MethodFit
from trady.planning.budget import Budget
from trady.planning.scopes import PEAK
from trady.report.units import format_bytes

RATE = 1e-6

#: All that are known, the last blocks in two numbers, and TraDy.
COMPARED = (*METHODS, "last-1", "last-2", TRADY)


@dataclass(frozen=True)
class Row:
    """One method on one workload.

    Attributes:
        workload: Its name.
        samples: Of the batch.
        method: Its name.
        title: For people; tells TraDy's budgets apart.
        refused: Why there is no figure.
        predicted_bytes: Peak of a step, before there was one.
        measured_bytes: Peak of the real step, by the ledger.
        predicted_parts: What the predicted peak is made of.
        measured_parts: What the measured one is made of.
    """

    workload: str
    samples: int
    method: str
    title: str
    refused: str | None
    predicted_bytes: int = 0
    measured_bytes: int = 0
    predicted_parts: dict[str, int] | None = None
    measured_parts: dict[str, int] | None = None

    @property
    def error(self) -> float:
        """Prediction over measurement, less one: negative where the prediction is too low."""
        return self.predicted_bytes / self.measured_bytes - 1


def measured(workload: Workload, task: Task, row: MethodFit) -> trady.Ledger:
    """Run two steps of a method; account for the second one."""
    if row.method == TRADY:
        tuner = trady.prepare(task.model, task.batch, budget=Budget(PEAK, row.budget_bytes or 1))
        task.model.train()
        step = stepping(task, tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=RATE)))
        step()
        return tuner.ledger(step, inference=False)
    read_method(row.method).apply(task.model, Settings(block_classes=workload.blocks))
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    step = stepping(task, torch.optim.AdamW(trained, lr=RATE))
    step()
    return trady.measure(step, task.model, inference=False)


def stepping(task: Task, optimizer: torch.optim.Optimizer) -> Any:
    """Return a training step."""

    def step() -> None:
        task.run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(workload: Workload, make: Any, methods: Sequence[str], progress: Console) -> list[Row]:
    """Ask, then run what was asked about."""
    task = make()
    asked = trady.fit(task.model, task.batch, methods=methods, blocks=workload.blocks, device="cpu")
    rows = []
    for told in asked.rows:
        refused = told.refused or (None if told.trainable_parameters else "nothing trains in it")
        if refused is not None:
            rows.append(Row(workload.name, asked.batch_size, told.method, told.title, refused))
            continue
        started = time.perf_counter()
        ledger = measured(workload, make(), told)
        row = Row(
            workload.name,
            asked.batch_size,
            told.method,
            told.title,
            None,
            told.peak_bytes,
            ledger.peak_bytes,
            dict(told.parts),
            dict(ledger.parts),
        )
        peaks = f"predicted {format_bytes(row.predicted_bytes)}, measured {format_bytes(row.measured_bytes)}"
        seconds = time.perf_counter() - started
        progress.print(f"{workload.name}  {told.title}: {peaks} ({row.error:+.2%}), {seconds:.0f} s", style="dim")
        rows.append(row)
        gc.collect()
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    """Return errors, a line a method and a column a workload."""
    table = Table(title="Predicted over measured peak of a training step", title_justify="left")
    workloads = list(dict.fromkeys(row.workload for row in rows))
    table.add_column("method")
    for name in workloads:
        table.add_column(name, justify="right")
    found = {(row.title, row.workload): row for row in rows}
    for title in dict.fromkeys(row.title for row in rows):
        cells = [found.get((title, name)) for name in workloads]
        table.add_row(title, *("–" if row is None or row.refused else f"{row.error:+.2%}" for row in cells))
    return table


def judge(rows: Sequence[Row]) -> Verdict:
    """Hold the errors against what is promised."""
    errors = [row.error for row in rows if row.refused is None]
    worst = f"{min(errors):+.2%} to {max(errors):+.2%} in {len(errors)} steps"
    return Verdict(f"within {MOST_ERROR:.0%} of the ledger", worst, all(abs(error) <= MOST_ERROR for error in errors))


def run(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    parser.add_argument("--llama", action="store_true", help="the shape of Llama-3.2-3B instead of the workloads")
    parser.add_argument("--method", nargs="+", default=list(COMPARED), metavar="NAME", help="which methods")
    add_workloads(parser, WORKLOADS)
    parser.add_argument(
        "--small",
        nargs="+",
        choices=list(WORKLOADS),
        default=[],
        metavar="NAME",
        help="workloads of which a quarter of the batch is taken, which takes less time (default: none)",
    )
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    console, progress = console_for(options.json), Console(stderr=True)
    if options.llama:
        return llama.run(console, options.json)
    rows: list[Row] = []
    for name in options.workload:
        workload, models = WORKLOADS[name], models_folder(options.models)

        def make(workload: Workload = workload, models: Any = models) -> Task:
            task = workload.make(models)
            return reduced(task) if workload.name in options.small else task

        rows += compare(workload, make, options.method, progress)
        if options.json != "-":  # a long run leaves what it has
            write_json(options.json, as_figures(rows))
    console.print(as_table(rows))
    verdict = judge(rows)
    console.print(f"{'[green]pass[/]' if verdict.met else '[red]FAIL[/]'}  {verdict.bar}: {verdict.measured}")
    write_json(options.json, as_figures(rows))
    return int(not verdict.met)


def as_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what is written."""
    figures = [asdict(row) | ({} if row.refused else {"error": row.error}) for row in rows]
    return {"optimizer": "adamw", "rows": figures, "bar": asdict(judge(rows))}


if __name__ == "__main__":
    main(run)
