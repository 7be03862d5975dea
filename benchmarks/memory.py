"""Tensor memory of one training step: TraDy and its peers against inference.

``saved`` is what autograd keeps between forward and backward, ``peak`` the most that was alive at one
time, both from ``trady.measure``; peaks are without weights and batch, for training and for inference.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import trady
from benchmarks.gradients import gradient_errors
from benchmarks.methods import METHODS, PEERS, TITLES, Step
from benchmarks.options import (
    add_device,
    add_json,
    add_layout,
    add_methods,
    add_models,
    add_workloads,
    console_for,
    device_of,
    main,
    models_folder,
    write_json,
)
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError, Task
from benchmarks.workloads import MIB, WORKLOADS, Workload, laid_out

#: The floor is a bound of time, not of memory.
MEASURED = tuple(method for method in METHODS if method != "floor")


@dataclass(frozen=True)
class Row:
    """Memory of one method's step.

    Attributes:
        method: A key of ``METHODS``.
        saved_bytes: Kept between forward and backward.
        peak_bytes: Peak without weights and batch.
        inference_peak_bytes: That of an inference pass of the untouched model on the same batch.
        channel_bytes: Saved input channels, a part of ``saved_bytes``.
        seed: Seed of the channels drawn.
        trainable_parameters: Elements that an update changes.
        gradient_error: Largest relative error of a layer's selected channels against the dense gradient;
            ``None`` where it is not measured.
        note: What a reader should know.
        allocator_peak_bytes: On CUDA, the peak of PyTorch's allocator in the step, weights and batch included.
    """

    method: str
    saved_bytes: int
    peak_bytes: int
    inference_peak_bytes: int
    channel_bytes: int
    seed: int
    trainable_parameters: int = 0
    gradient_error: float | None = None
    note: str = ""
    allocator_peak_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """Peak of the step over that of inference."""
        return self.peak_bytes / self.inference_peak_bytes

    @classmethod
    def of(cls, method: str, step: Step, inference_peak_bytes: int, seed: int, error: float | None) -> Row:
        """Run a step and read the row off its ledger."""
        ledger = step.ledger()
        return cls(
            method,
            ledger.saved_bytes,
            ledger.working_peak_bytes,
            inference_peak_bytes,
            ledger.saved_bytes_of("channels"),
            seed,
            step.trainable_parameters,
            error,
            step.note,
            ledger.allocator_peak_bytes,
        )


@dataclass(frozen=True)
class Measured:
    """Memory of every method on one workload.

    Attributes:
        rows: One a method, or one a draw.
        skipped: The other methods, and why each is left out.
        scores_peak_bytes: The inference peak without labels in the batch, that is without a loss; ``None``
            where the batch has none.
    """

    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    scores_peak_bytes: int | None = None


@dataclass(frozen=True)
class Verdict:
    """A bar, and what was measured."""

    bar: str
    measured: str
    met: bool


def inference_peak(task: Task, *, labels: bool = True) -> int:
    """Measure the working peak of one pass of the untouched model, in evaluation mode without gradients.

    Args:
        task: The task.
        labels: Whether labels in the batch stay there, so that the model computes its loss.

    """
    batch = task.batch
    if not labels:
        batch = {name: value for name, value in batch.items() if name != "labels"}
    task.model.eval()
    inference = Task(task.model, batch, lambda output: torch.empty(0))
    with torch.no_grad():
        return trady.measure(inference.run, task.model, inference=False).working_peak_bytes


def measure(workload: Workload, models: Path, draws: int = 1, methods: Collection[str] = MEASURED) -> Measured:
    """Measure every method.

    Args:
        workload: The workload.
        models: Folder of the backbones.
        draws: Draws of TraDy's channels to measure, one a seed, where their memory depends on luck; there
            is a row for each.
        methods: Keys of ``METHODS``.

    """
    inference, scores = _inference_peaks(workload.make(models))
    rows, skipped = [], {}
    for method in methods:
        for seed in range(draws if method in ("trady", "static-random") and workload.budget else 1):
            error = None
            if method == "trady" and seed == 0 and workload.bars.gradient_error is not None:
                error = max(gradient_errors(workload, models, seed).values())
            gc.collect()  # models that are gone would be in the allocator's peak
            try:
                rows.append(_row(workload, models, method, seed, inference, error))
            except (SkippedError, MissingPackageError) as reason:
                skipped[method] = str(reason)
    return Measured(tuple(rows), skipped, scores)


def _row(workload: Workload, models: Path, method: str, seed: int, inference: int, error: float | None) -> Row:
    with METHODS[method](workload, workload.make(models), seed) as step:
        return Row.of(method, step, inference, seed, error)


def _inference_peaks(task: Task) -> tuple[int, int | None]:
    labelled = isinstance(task.batch, Mapping) and "labels" in task.batch
    return inference_peak(task), inference_peak(task, labels=False) if labelled else None


def judge(workload: Workload, rows: Sequence[Row]) -> list[Verdict]:
    """Hold every draw of TraDy against the workload's bars."""
    drawn = [row for row in rows if row.method == "trady"]
    if not drawn:
        return []
    bars = workload.bars
    ratio, saved, peak = (max(getattr(row, name) for row in drawn) for name in ("ratio", "saved_bytes", "peak_bytes"))
    aim = f" (aim {bars.peak_aim:.1f} ×)" if bars.peak_aim is not None else ""
    most = f"at most {bars.peak_over_inference:.1f} × the inference peak{aim}"
    verdicts = [Verdict(f"peak {most}", f"{ratio:.3f} ×", ratio <= bars.peak_over_inference)]
    if bars.saved_bytes is not None:
        most = f"at most {bars.saved_bytes / MIB:.0f} MiB"
        verdicts.append(Verdict(f"saved {most}", f"{saved / MIB:.1f} MiB", saved <= bars.saved_bytes))
    peers = [row for row in rows if row.method in PEERS]
    if bars.below_peers and peers:
        least = min(peers, key=lambda row: row.peak_bytes)
        measured = f"{peak / MIB:.1f} MiB, {TITLES[least.method]} {least.peak_bytes / MIB:.1f} MiB"
        verdicts.append(Verdict("peak below that of every peer but the head alone", measured, peak < least.peak_bytes))
    errors = [row.gradient_error for row in drawn if row.gradient_error is not None]
    if bars.gradient_error is not None and errors:
        most = f"at most {bars.gradient_error:.0e}"
        verdicts.append(Verdict(f"gradient error {most}", f"{max(errors):.1e}", max(errors) <= bars.gradient_error))
    return verdicts


def worst_draws(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Return, for every method, the row with the highest peak and the number of draws that it is of."""
    drawn: dict[str, list[Row]] = {}
    for row in rows:
        drawn.setdefault(row.method, []).append(row)
    return [(max(group, key=lambda row: row.peak_bytes), len(group)) for group in drawn.values()]


def as_table(workload: Workload, rows: Sequence[Row]) -> Table:
    """Return the table that a person reads; of several draws it shows the one with the highest peak."""
    table = Table(title=f"{workload.name}: {workload.describe}", title_justify="left")
    table.add_column("method")
    columns = ["saved", "peak", "inference peak", "peak ÷ inference", "trainable"]
    with_errors = any(row.gradient_error is not None for row in rows)
    with_allocator = any(row.allocator_peak_bytes is not None for row in rows)
    for column in [*columns, *["gradient error"] * with_errors, *["allocator peak"] * with_allocator]:
        table.add_column(column, justify="right", no_wrap=True)
    for row, draws in worst_draws(rows):
        title = TITLES[row.method] + (f" (worst of {draws} draws)" if draws > 1 else "")
        sizes = (f"{size / MIB:.1f} MiB" for size in (row.saved_bytes, row.peak_bytes, row.inference_peak_bytes))
        trainable = f"{row.trainable_parameters:,}".replace(",", " ")
        error = [] if not with_errors else [f"{row.gradient_error:.1e}" if row.gradient_error is not None else ""]
        allocator = [f"{row.allocator_peak_bytes / MIB:.1f} MiB"] if row.allocator_peak_bytes is not None else []
        table.add_row(title, *sizes, f"{row.ratio:.2f} ×", trainable, *error, *allocator)
    return table


def remarks(measured: Measured) -> list[str]:
    """List what belongs below the table: how methods were applied, what is left out, and why."""
    found = {row.method: f"{TITLES[row.method]}: {row.note}" for row in measured.rows if row.note}
    left_out = [f"{TITLES[method]} is left out: {reason}" for method, reason in measured.skipped.items()]
    if measured.scores_peak_bytes is not None:
        peak = f"{measured.scores_peak_bytes / MIB:.1f} MiB"
        left_out.append(f"The inference pass computes the model's own loss, as the step does; without labels: {peak}")
    return [*found.values(), *left_out]


def as_json(measured: Measured, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return every figure of a workload."""
    return {
        "rows": [{**asdict(row), "ratio": row.ratio} for row in measured.rows],
        "skipped": dict(measured.skipped),
        "inference_peak_without_labels_bytes": measured.scores_peak_bytes,
        "bars": [asdict(verdict) for verdict in verdicts],
    }


def run(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    add_workloads(parser, WORKLOADS)
    add_layout(parser)
    add_device(parser)
    add_methods(parser, MEASURED, MEASURED)
    parser.add_argument("--draws", type=int, default=3, help="draws of TraDy's channels to measure (default: 3)")
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    device = device_of(options)
    console, figures, missed = console_for(options.json), dict[str, Any](), False
    for name in options.workload:
        workload = laid_out(WORKLOADS[name], channels_last=options.channels_last, device=device)
        measured = measure(workload, models_folder(options.models), max(1, options.draws), options.method)
        verdicts = judge(workload, measured.rows)
        console.print(as_table(workload, measured.rows))
        for remark in remarks(measured):
            console.print(remark, style="dim", highlight=False)
        for verdict in verdicts:
            word = "[green]pass[/]" if verdict.met else "[red]FAIL[/]"
            console.print(f"{word}  {verdict.bar}: {verdict.measured}")
        missed |= not all(verdict.met for verdict in verdicts)
        figures[name] = as_json(measured, verdicts)
    write_json(options.json, {"device": str(device), "workloads": figures})
    return int(missed)


if __name__ == "__main__":
    main(run)
