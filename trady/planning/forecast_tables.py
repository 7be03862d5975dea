"""Forecasts as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from trady.planning.budget import parse_budget
from trady.report.units import format_bytes, format_count, format_percent, range_bar

if TYPE_CHECKING:
    from trady.planning.forecast import Cell, Point


def curve_view(points: Sequence[Point], budget_bytes: int | None) -> RenderableType:
    """Show peaks over shares of channels, with a bar from the lowest to the highest for each."""
    choice = any(point.kept_peak_bytes != point.recomputed_peak_bytes for point in points)
    table = Table(title="Peak of a step, by the share of channels that trains in every layer", title_justify="left")
    table.add_column("trains", justify="right")
    table.add_column("channels", justify="right")
    for heading in ("all recomputed", "all kept") if choice else ("peak",):
        table.add_column(heading, justify="right", no_wrap=True)
    top = max(max(p.kept_peak_bytes, p.recomputed_peak_bytes) for p in points)
    limit = ", ◆ where the budget is" if budget_bytes is not None and budget_bytes <= top else ""
    table.add_column(f"0 to {format_bytes(top)}{limit}", no_wrap=True)
    for point in points:
        low, high = sorted((point.recomputed_peak_bytes, point.kept_peak_bytes))
        peaks = (point.recomputed_peak_bytes, point.kept_peak_bytes) if choice else (high,)
        table.add_row(
            format_percent(point.share),
            format_count(point.channels),
            *map(format_bytes, peaks),
            range_bar(low, high, top, budget_bytes),
        )
    return table


def sweep_view(cells: Sequence[Cell], unit: str) -> RenderableType:
    """Show what several budgets buy with several batch sizes; ``unit`` is what a batch counts."""
    budgets, batches = (
        list(dict.fromkeys(keys)) for keys in zip(*((c.budget, c.batch_size) for c in cells), strict=True)
    )
    found = {(cell.budget, cell.batch_size): cell for cell in cells}
    table = Table(
        title="Channels that train, predicted peak of a step, and what is recomputed of a forward pass",
        title_justify="left",
        show_lines=True,
    )
    table.add_column("budget")
    for batch in batches:
        table.add_column(f"{batch} {unit}", justify="right")
    for budget in budgets:
        table.add_row(budget, *(_cell(found[budget, batch]) for batch in batches))
    return table


def _cell(cell: Cell) -> str:
    if not cell.possible:
        in_bytes = parse_budget(cell.budget).scope.in_bytes
        least = format_bytes(cell.predicted_peak_bytes) if in_bytes else f"{cell.predicted_peak_bytes} elements"
        return f"impossible\nminimum {least}"
    lines = [f"{format_percent(cell.channel_share)} of the channels", format_bytes(cell.predicted_peak_bytes)]
    if cell.recomputed_share:
        lines.append(f"{format_percent(cell.recomputed_share)} recomputed")
    if cell.micro_batch is not None:
        lines.append(f"{cell.micro_batch} at a time")
    return "\n".join(lines)
