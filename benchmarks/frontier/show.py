"""The tables and pictures of the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from rich.table import Table

from benchmarks.frontier.results import UP_TO, Duel, Point, duels, way_of
from benchmarks.frontier.tasks import FrontierTask
from benchmarks.tasks import needs

MIB = 2**20

COLOURS = {
    "trady+": "#0b6e8a", "trady": "#35a7c4", "static random": "#8f7ac2", "last k blocks": "#c0392b",
    "full fine-tuning": "#444444", "LoRA": "#d98a1f", "DoRA": "#b8741a", "rsLoRA": "#e5ab5a", "BitFit": "#5b9a50",
}  # fmt: skip
OTHERS = "#7b8a94"


def table(task: FrontierTask, found: Sequence[Point]) -> Table:
    """Return the table of a task."""
    view = Table(title=task.describe, title_justify="left")
    view.add_column("method", no_wrap=True)
    for column in ("top-1 %", "± seeds", "peak MiB", "÷ inference", "least peak MiB", "step ÷ full", "trains", "rate"):
        view.add_column(column, justify="right", no_wrap=True)
    for point in found:
        usual, least = point.usual, point.cheapest
        view.add_row(
            point.method.title,
            f"{100 * point.accuracy:.1f}",
            f"{100 * point.deviation:.1f}" if len(point.accuracies) > 1 else "–",
            "–" if usual is None else f"{usual['peak_bytes'] / MIB:.1f}",
            "–" if usual is None else f"{usual['peak_bytes'] / usual['inference_peak_bytes']:.2f}",
            "" if least is None or least is usual else f"{least['peak_bytes'] / MIB:.1f} ({way_of(least)})",
            "–" if usual is None else f"{usual['step_over_full']:.2f}",
            f"{point.trainable:,}".replace(",", " "),
            f"{point.rate:g}" + "*" * point.at_edge,
            style="bold" if point.ours else None,
        )
    view.caption = (
        "peaks are without weights and batch; × is that of inference; * the best rate is at the edge of its grid"
    )
    return view


def lost_lines(found: Sequence[Point]) -> list[str]:
    """Say where another method lies above TraDy's line, and where TraDy has no point so low."""
    lines = []
    for duel in duels(found):
        way = way_of(duel.cost) or "whole batch"
        where = f"{duel.theirs.method.title} ({way}, {duel.cost['peak_bytes'] / MIB:.1f} MiB)"
        if duel.ours is None:
            lines.append(f"no TraDy so low: {where}, {100 * duel.theirs.accuracy:.1f} %")
        elif duel.lost:
            lines.append(f"better than TraDy: {where} by {_gap(duel)} over {duel.ours.method.title}")
    return lines or [f"no method up to {UP_TO:g} × inference lies above TraDy's line by more than one standard error"]


def _gap(duel: Duel) -> str:
    return f"{-duel.difference:.1f} ± {duel.error:.1f} points ({duel.pairs} seeds)"


def draw(task: FrontierTask, found: Sequence[Point], folder: Path) -> list[Path]:
    """Write ``<task>.svg`` and ``<task>.png``: peak memory of a step against accuracy, one line a method."""
    needs("matplotlib", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    axis = figure.add_subplot()
    inference = next(cost["inference_peak_bytes"] for point in found for cost in point.costs) / MIB
    lines: dict[str, list[Point]] = {}
    for point in found:
        if point.costs:
            lines.setdefault(point.method.line or point.method.title, []).append(point)
    for name, members in lines.items():
        spots = sorted((cost["peak_bytes"] / MIB, 100 * p.accuracy) for p in members for cost in _shown(p))
        ours = members[0].ours
        axis.plot(
            *zip(*spots, strict=True), marker="o", markersize=5 if ours else 3.5, linewidth=2.2 if ours else 1.1,
            color=COLOURS.get(name, OTHERS), label=name, zorder=3 if ours else 2,
        )  # fmt: skip
        for point in members:
            if point.deviation and point.usual:
                axis.errorbar(point.usual["peak_bytes"] / MIB, 100 * point.accuracy, 100 * point.deviation,
                              color=COLOURS.get(name, OTHERS), linewidth=0.7, alpha=0.6)  # fmt: skip
    axis.axvline(inference, color="#999999", linestyle="--", linewidth=1)
    axis.annotate("inference", (inference, 0.01), (4, 2), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=8, color="#666666")  # fmt: skip
    axis.set_xscale("log")
    ticks = [
        tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if axis.get_xlim()[0] < tick < axis.get_xlim()[1]
    ]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("peak memory of a step, MiB (without weights and batch)")
    axis.set_ylabel("top-1 accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, color="#eeeeee", linewidth=0.8)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(fill(task.describe, 95), fontsize=9.5, loc="left")
    paths = [folder / f"{task.name}.svg", folder / f"{task.name}.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _shown(point: Point) -> list[dict[str, float]]:
    """The ways of running a method that are drawn: all of a single method, the usual one of a member of a line."""
    alone = point.method.line in ("", point.method.title) or point.method.name in (
        "full",
        "lora",
        "dora",
        "rslora",
        "bitfit",
    )
    costs = point.costs if alone else tuple(cost for cost in point.costs if cost is point.usual)
    return [dict(cost) for cost in costs]
