"""What a process takes for a training, part by part.

``growth`` is the memory of the process over the ledger's peak, with the processor time that a step costs, for several
settings of the allocator. ``imports`` is what lies in memory before a model does. ``prediction`` holds what process
budgets predict against what runs took. ``limit`` runs the demo and three workloads again and again in a group of the
kernel's that kills what exceeds the budget. Everything is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.options import add_json, add_models, add_workloads, console_for, machine, main, models_folder
from benchmarks.process.growth import Growth
from benchmarks.process.hard_limit import run_limited
from benchmarks.process.imports import STATES
from benchmarks.process.training import Trained
from trady.errors import TrainingError
from trady.planning.budget import Budget, parse_budget
from trady.planning.scopes import PROCESS
from trady.report.units import format_bytes

WORKLOADS = ("mbv2-w0.35", "mcunet-5fps", "effnet", "mobilenetv2", "minilm", "vit-tiny")

PARTS = ("growth", "imports", "prediction", "limit")

#: Growth over the ledger's peak, and how far a prediction may be off.
MOST_GROWTH, MOST_ERROR = 1.15, 0.05

#: What runs under a hard limit.
LIMITED = ("demo", "mbv2-w0.35", "effnet", "vit-tiny")

_MIB = 1 << 20

#: Above the minimum, in MiB: hardly anything trains, or much of it.
_MARGINS = (4, 32)


def limit(name: str, demo_budget: str, runs: int, models: Path) -> dict[str, Any]:
    """Run the demo or a workload under a hard limit at the budget."""
    if name == "demo":
        with tempfile.TemporaryDirectory() as folder:
            demo = ["trady", "demo", "--short", "--budget", demo_budget, "--out", folder, "--json"]
            files = _trained("effnet", _budgets("effnet", models)[0], models).file_bytes
            return _limited(name, [sys.executable, "-m", *demo], demo_budget, runs, files)
    budget = _budgets(name, models)[0]
    files = _trained(name, budget, models).file_bytes
    command = [sys.executable, "-m", "benchmarks.process.training", name, budget, str(models)]
    return _limited(name, command, budget, runs, files)


def _limited(name: str, command: Sequence[str], budget: str, runs: int, file_bytes: int) -> dict[str, Any]:
    # Pages of files that another process has read before are not charged to the group: the limit is less by them, so
    # that it is hit when the process takes more than the budget.
    limit_bytes = parse_budget(budget).amount - file_bytes
    outcomes = [run_limited(command, limit_bytes, os.environ) for _ in range(runs)]
    failed = next((o for o in outcomes if o.code and not o.killed), None)
    if failed is not None:
        raise TrainingError(f"{name} in {budget} ended with exit code {failed.code}: {failed.errors}")
    return {
        "run": name,
        "budget": budget,
        "limit_bytes": limit_bytes,
        "runs": runs,
        "killed": sum(o.killed for o in outcomes),
        "group_peak_bytes": max(o.group_peak_bytes for o in outcomes),
        "process_peak_bytes": max((_process_peak(o.output) for o in outcomes if not o.killed), default=None),
        "seconds": sum(o.seconds for o in outcomes) / runs,
    }


def _process_peak(output: str) -> int:
    """What a run says of itself."""
    found = json.loads(output[output.index("{") :])
    return int(found["measured_bytes"] if "measured_bytes" in found else found["process_peak_bytes"])


def _budgets(name: str, models: Path) -> list[str]:
    least = _trained(name, "process:1 MiB", models).minimum_bytes
    return [str(Budget(PROCESS, (-(-least // _MIB) + above) * _MIB)) for above in _MARGINS]


def _trained(name: str, budget: str, models: Path) -> Trained:
    return Trained(**_child("training", name, budget, str(models)))


def _child(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.process.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _show(console: Any, parts: Mapping[str, Any]) -> None:
    if "growth" in parts:
        table = _table(
            "growth of the process over the ledger's peak", "workload", "gives back from", "ledger", "growth"
        )
        _columns(table, "ratio", "once", "processor time of a step")
        for row in (Growth(**each) for each in parts["growth"]):
            setting = f"{row.threshold_kib} KiB" if row.threshold_kib else "glibc's own"
            figures = (row.ledger_bytes, row.growth_bytes)
            cells = (*map(format_bytes, figures), f"{row.ratio:.2f}", format_bytes(row.once_bytes))
            table.add_row(row.workload, setting, *cells, f"{row.cpu_seconds:.3f} s")
        console.print(table)
    if "imports" in parts:
        table = _table("resident memory", "after", "as PyTorch imports", "with the compiler waiting")
        found = {row["how"]: row for row in parts["imports"]}
        for state in STATES:
            table.add_row(state, *(format_bytes(found[how][state]) for how in ("before", "after")))
        console.print(table)
    if "prediction" in parts:
        table = _table("process budgets", "workload", "budget", "predicted", "measured", "error", "channels")
        for trained in (Trained(**each) for each in parts["prediction"]):
            figures = (trained.predicted_bytes, trained.measured_bytes)
            cells = (*map(format_bytes, figures), f"{_error(trained):+.1%}", str(trained.channels))
            table.add_row(trained.workload, trained.budget, *cells)
        console.print(table)
    if "limit" in parts:
        table = _table("under a hard limit", "run", "budget", "limit", "runs", "killed")
        _columns(table, "peak of the process", "charged to its group")
        for row in parts["limit"]:
            figures = (row["process_peak_bytes"] or 0, row["group_peak_bytes"])
            counts = (format_bytes(row["limit_bytes"]), str(row["runs"]), str(row["killed"]))
            table.add_row(row["run"], row["budget"], *counts, *map(format_bytes, figures))
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    return _columns(table, *columns)


def _columns(table: Table, *columns: str) -> Table:
    for column in columns:
        table.add_column(column, justify="left" if not table.columns else "right", no_wrap=True)
    return table


def _error(trained: Trained) -> float:
    return trained.measured_bytes / trained.predicted_bytes - 1


def _above(row: Mapping[str, Any]) -> bool:
    """Whether a process was ever above its budget, file pages included."""
    return int(row["process_peak_bytes"] or 0) > parse_budget(row["budget"]).amount


def _missed(parts: Mapping[str, Any]) -> bool:
    """Whether a bar is: growth as trady sets the allocator, predictions, kills."""
    grown = [Growth(**each).ratio for each in parts.get("growth", ()) if each["threshold_kib"] == 128]
    wrong = [abs(_error(Trained(**each))) for each in parts.get("prediction", ())]
    return (
        any(ratio > MOST_GROWTH for ratio in grown)
        or any(error > MOST_ERROR for error in wrong)
        or any(row["killed"] or _above(row) for row in parts.get("limit", ()))
    )


def run() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.process", description=__doc__)
    add_models(parser)
    add_workloads(parser, WORKLOADS)
    add_json(parser)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="which (default: all)")
    parser.add_argument("--thresholds", nargs="+", type=int, default=[0, 128], metavar="KIB", help="0 is glibc's own")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="runs under the limit (default: 20)")
    parser.add_argument(
        "--limited", nargs="+", choices=LIMITED, default=list(LIMITED), help="what runs under the limit"
    )
    parser.add_argument("--demo-budget", default="process:384 MiB", help="default: %(default)s")
    options = parser.parse_args()
    models, parts = models_folder(options.models), _earlier(options.json)
    for part, key, measure in _measurements(options, models):
        rows = [row for row in parts.get(part, ()) if [row[name] for name in key] != list(key.values())]
        parts[part] = [*rows, measure()]
        _write(options.json, parts)
    _show(console_for(options.json), parts)
    if options.json == "-":
        sys.stdout.write(_text(parts))
    return 1 if _missed(parts) else 0


def _measurements(
    options: argparse.Namespace, models: Path
) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield what is to be measured: its part, what tells its row from others, and how."""
    for name in options.workload if "growth" in options.part else ():
        for kib in options.thresholds:
            key = {"workload": name, "threshold_kib": kib}
            yield "growth", key, partial(_child, "growth", name, str(kib), str(models))
    for how in ("before", "after") if "imports" in options.part else ():
        yield "imports", {"how": how}, partial(_child, "imports", how)
    for name in options.workload if "prediction" in options.part else ():
        for budget in _budgets(name, models):
            key = {"workload": name, "budget": budget}
            yield "prediction", key, partial(_child, "training", name, budget, str(models))
    for name in options.limited if "limit" in options.part else ():
        yield "limit", {"run": name}, partial(limit, name, options.demo_budget, options.runs, models)


def _write(target: str | None, parts: Mapping[str, Any]) -> None:
    """Write what is measured so far, so that an interrupted command loses nothing."""
    if target not in (None, "-"):
        Path(str(target)).write_text(_text(parts), encoding="utf-8")


def _text(parts: Mapping[str, Any]) -> str:
    return json.dumps({"machine": machine(), **parts}, indent=1) + "\n"


def _earlier(target: str | None) -> dict[str, Any]:
    """Parts that are in the file already, and stay unless they are measured again."""
    if target in (None, "-") or not Path(str(target)).exists():
        return {}
    found: dict[str, Any] = json.loads(Path(str(target)).read_text(encoding="utf-8"))
    return {part: found[part] for part in PARTS if part in found}


if __name__ == "__main__":
    main(run)
