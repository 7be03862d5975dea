"""Tensor memory of one training step: full fine-tuning, head only and TraDy against inference.

``saved`` is what autograd keeps between forward and backward, ``peak`` the most that was alive at one
time, both from ``trady.measure``; peaks are without weights and batch, for training and for inference.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.methods import METHODS, TITLES
from benchmarks.options import add_json, add_models, add_workloads, main, models_folder, write_json
from benchmarks.workloads import MIB, WORKLOADS, Workload
from trady import Ledger
from trady.errors import TradyError

#: The floor is a bound of time, not of memory.
MEASURED = ("full", "head", "trady")


@dataclass(frozen=True)
class Row:
    """Memory of one method's step.

    Attributes:
        method: A key of ``METHODS``.
        saved_bytes: Kept between forward and backward.
        peak_bytes: Peak without weights and batch.
        inference_peak_bytes: That of an inference pass of the untouched model.
        channel_bytes: Saved input channels, a part of ``saved_bytes``.
        seed: Seed of the channels drawn.
    """

    method: str
    saved_bytes: int
    peak_bytes: int
    inference_peak_bytes: int
    channel_bytes: int
    seed: int

    @property
    def ratio(self) -> float:
        """Peak of the step over that of inference."""
        return self.peak_bytes / self.inference_peak_bytes

    @classmethod
    def of(cls, method: str, ledger: Ledger, seed: int) -> Row:
        """Read the row off a ledger."""
        inference = ledger.inference_working_peak_bytes
        if inference is None:
            raise TradyError("; ".join(ledger.remarks))
        channels = ledger.saved_bytes_of("channels")
        return cls(method, ledger.saved_bytes, ledger.working_peak_bytes, inference, channels, seed)


@dataclass(frozen=True)
class Verdict:
    """A bar, and what was measured."""

    bar: str
    measured: str
    met: bool


def measure(workload: Workload, models: Path, draws: int = 1) -> list[Row]:
    """Measure every method.

    Args:
        workload: The workload.
        models: Folder of the backbones.
        draws: Draws of TraDy's channels to measure, one a seed, where their memory depends on luck; there
            is a row for each.

    """
    rows = []
    for method in MEASURED:
        for seed in range(draws if method == "trady" and workload.budget else 1):
            with METHODS[method](workload, workload.make(models), seed) as step:
                rows.append(Row.of(method, step.ledger(), seed))
    return rows


def judge(workload: Workload, rows: Sequence[Row]) -> list[Verdict]:
    """Hold every draw of TraDy against the workload's bars."""
    drawn = [row for row in rows if row.method == "trady"]
    bars = workload.bars
    ratio = max(row.ratio for row in drawn)
    most = f"at most {bars.peak_over_inference:.1f} × the inference peak"
    verdicts = [Verdict(f"peak {most}", f"{ratio:.3f} ×", ratio <= bars.peak_over_inference)]
    if bars.saved_bytes is not None:
        saved = max(row.saved_bytes for row in drawn)
        most = f"at most {bars.saved_bytes / MIB:.0f} MiB"
        verdicts.append(Verdict(f"saved {most}", f"{saved / MIB:.1f} MiB", saved <= bars.saved_bytes))
    return verdicts


def as_table(workload: Workload, rows: Sequence[Row]) -> Table:
    """Return the table that a person reads; of several draws it shows the one with the highest peak."""
    table = Table(title=f"{workload.name}: {workload.describe}", title_justify="left")
    table.add_column("method")
    for column in ("saved", "peak", "inference peak", "peak ÷ inference"):
        table.add_column(column, justify="right", no_wrap=True)
    for method in dict.fromkeys(row.method for row in rows):
        drawn = [row for row in rows if row.method == method]
        row = max(drawn, key=lambda row: row.peak_bytes)
        title = TITLES[method] + (f" (worst of {len(drawn)} draws)" if len(drawn) > 1 else "")
        sizes = (f"{size / MIB:.1f} MiB" for size in (row.saved_bytes, row.peak_bytes, row.inference_peak_bytes))
        table.add_row(title, *sizes, f"{row.ratio:.2f} ×")
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    add_workloads(parser, WORKLOADS)
    parser.add_argument("--draws", type=int, default=3, help="draws of TraDy's channels to measure (default: 3)")
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    console, figures, missed = Console(stderr=options.json == "-"), dict[str, Any](), False
    for name in options.workload:
        workload = WORKLOADS[name]
        rows = measure(workload, models_folder(options.models), max(1, options.draws))
        verdicts = judge(workload, rows)
        console.print(as_table(workload, rows))
        for verdict in verdicts:
            word = "[green]pass[/]" if verdict.met else "[red]FAIL[/]"
            console.print(f"{word}  {verdict.bar}: {verdict.measured}")
        missed |= not all(verdict.met for verdict in verdicts)
        figures[name] = {
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
            "bars": [asdict(verdict) for verdict in verdicts],
        }
    write_json(options.json, {"workloads": figures})
    return int(missed)


if __name__ == "__main__":
    main(run)
