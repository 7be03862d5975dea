"""The tables of ``benchmarks.gpu``, as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.table import Table

from benchmarks.workloads import MIB

Rows = Iterator[tuple[str, ...]]


def as_table(part: str, title: str, items: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return one part's table; whatever was left out or failed has a row with the reason."""
    columns, rows = _TABLES[part]
    table = Table(title=f"{part}: {title}", title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 1 else "left")
    for item, figures in items.items():
        for row in rows(figures):
            table.add_row(item, *row)
        for key in ("left_out", "error", "ended"):
            if key in figures:
                table.add_row(item, f"{key.replace('_', ' ')}: {figures[key]}"[:200])
    return table


def _gradients(figures: Mapping[str, Any]) -> Rows:
    for variant, errors in figures.items():
        if isinstance(errors, Mapping):
            if "error" in errors:
                yield variant, errors["error"][:80]
            else:
                yield variant, f"{errors['largest']:.1e}", f"{errors['median']:.1e}", str(errors["layers"])


def _peaks(figures: Mapping[str, Any]) -> Rows:
    for step in figures.get("steps", []):
        allocator = step["allocator"]
        sizes = (step[name] / MIB for name in ("budget", "predicted", "ledger"))
        over = "" if allocator is None else f"{100 * (allocator / step['budget'] - 1):+.1f} %"
        yield (
            f"{step['dtype']}, {step['recompute']}",
            *(f"{size:.1f}" for size in sizes),
            "" if allocator is None else f"{allocator / MIB:.1f}",
            over,
        )


def _steps(figures: Mapping[str, Any]) -> Rows:
    full = figures.get("full", {}).get("step")
    for method, times in figures.items():
        if not isinstance(times, Mapping) or "step" not in times:
            continue
        yield (
            method,
            f"{1e3 * times['step']:.1f}",
            f"{1e3 * times['host']:.1f}",
            f"{times['step'] / full:.2f}" if full else "",
            str(sum(times.get("synchronisations", {}).values())),
            _captured(times),
        )


def _captured(figures: Mapping[str, Any]) -> str:
    replay = figures.get("captured", {})
    return f"{1e3 * replay['step']:.1f}" if "step" in replay else str(replay.get("error", ""))[:60]


def _language(figures: Mapping[str, Any]) -> Rows:
    for method, found in figures.items():
        if isinstance(found, Mapping) and "peak" in found:
            yield (
                method,
                f"{found['peak'] / 2**30:.2f}",
                "" if found["predicted"] is None else f"{found['predicted'] / 2**30:.2f}",
                f"{found['tokens_a_second']:.0f}",
                f"{1e3 * found['step']:.0f}",
                f"{1e3 * found['host']:.0f}",
                _captured(found),
            )
        elif isinstance(found, Mapping):
            yield method, (found.get("left_out") or found.get("error", ""))[:80]


def _limits(figures: Mapping[str, Any]) -> Rows:
    if "batch" in figures:
        yield "", str(figures["batch"]), str(figures.get("length", ""))


def _replays(figures: Mapping[str, Any]) -> Rows:
    if "difference" in figures:
        why = figures["uncaptured_because"] or "replayed"
        yield why[:60], f"{figures['difference']:.1e}", f"{figures['again']:.1e}"


def _training(figures: Mapping[str, Any]) -> Rows:
    for name in ("accuracy", "loss"):
        if name in figures:
            yield name, " ".join(f"{value:.3f}" for value in figures[name])


_TABLES: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Rows]]] = {
    "gradients": (("workload", "computed in", "largest error", "median", "layers"), _gradients),
    "peaks": (
        ("workload", "dtype, recompute", "budget, MiB", "predicted", "ledger", "allocator", "allocator over budget"),
        _peaks,
    ),
    "replays": (("workload", "how passes ran", "difference", "of two that ran"), _replays),
    "times": (("workload", "method", "step, ms", "host, ms", "÷ full", "synchronisations", "captured, ms"), _steps),
    "language": (
        ("model", "method", "peak, GiB", "predicted", "tokens/s", "step, ms", "host, ms", "captured, ms"),
        _language,
    ),
    "limits": (("limit and method", "", "largest batch", "longest sequence"), _limits),
    "training": (("where and seed", "figure", "by epoch"), _training),
}
