"""An estimate as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from trady.report.units import format_bytes, format_percent

if TYPE_CHECKING:
    from trady.estimates.report import FitReport, MethodFit

#: What a peak is made of, in fewer words than the ledger has: columns, and the parts of the ledger in each.
COLUMNS = {
    "weights": ("weights", "compact parameters"),
    "optimizer": ("optimizer state",),
    "gradients": ("gradients", "compact gradients"),
    "activations": ("saved activations",),
    "batch": ("inputs",),
    "temporary": ("temporaries", "workspaces"),
}


#: Characters that no table needs.
_WIDEST = 1000

#: Parts that are a smaller share of all peaks have no column.
_SEEN = 0.005


def amounts(row: MethodFit) -> dict[str, int]:
    """Return the parts of a row's peak, by column."""
    return {column: sum(row.parts.get(part, 0) for part in parts) for column, parts in COLUMNS.items()}


def batch_of(report: FitReport) -> str:
    """Return the batch of a report, for people."""
    if report.length is not None:
        return f"{report.batch_size} × {report.length} tokens"
    if report.image_size is not None:
        return f"{report.batch_size} images of {report.image_size} × {report.image_size}"
    return f"{report.batch_size} samples"


def view(report: FitReport, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
    """Show a report: a row a method, and below what has to be known of them.

    Where a terminal is too narrow for all columns, those go that say what a peak is made of.
    """
    table = _table(report, whole=True)
    wanted = Measurement.get(console, options.update(width=_WIDEST), table).maximum
    if whole := wanted <= options.max_width:
        yield table
    else:
        yield _table(report, whole=False)
    for row in report.rows:
        if row.refused is not None:
            yield escape(f"{row.title} is left out: {row.refused}")
        elif row.note or row.channels is not None:
            channels = (
                "" if row.channels is None else f"{row.channels} channels ({format_percent(row.channel_share or 0)})"
            )
            yield escape(f"{row.title}: {', '.join(filter(None, (channels, row.note)))}")
    if report.advice is not None:
        yield escape(report.advice)
    if not whole:
        yield "[dim]What the peaks are made of: in a wider terminal, or --json.[/]"


def _table(report: FitReport, *, whole: bool) -> Table:
    weights = f"{report.parameters:,}".replace(",", " ") + f" parameters, {report.dtype}"
    autocast = f", autocast to {report.autocast}" if report.autocast else ""
    table = Table(
        title=escape(
            f"{report.model}: {weights}; {batch_of(report)}, {report.optimizer} as on {report.device}{autocast}"
        ),
        title_justify="left",
        caption="" if report.complete else "stopped: methods are missing",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    searched = report.memory_bytes is not None
    memory = format_bytes(report.memory_bytes or 0)
    told = [row for row in report.rows if row.refused is None]
    columns = [column for column in COLUMNS if any(amounts(row)[column] > _SEEN * row.peak_bytes for row in told)]
    parts = (*columns, "evaluation") if whole else ()
    for heading in ("trains", "peak", *parts):
        table.add_column(heading, justify="right", no_wrap=True)
    if searched:
        table.add_column(f"in {memory}", justify="right")
        table.add_column("largest batch", justify="right")
        if report.length is not None:
            table.add_column("longest", justify="right")
    for row in told:
        table.add_row(*_cells(report, row, columns if whole else None))
    return table


def _cells(report: FitReport, row: MethodFit, columns: Sequence[str] | None) -> Iterator[str]:
    from trady.estimates.report import MOST_SAMPLES

    fits = report.fits(row)
    share = row.trainable_parameters / max(report.parameters, 1)
    yield row.title
    yield format_percent(share)
    yield f"[bold]{format_bytes(row.peak_bytes)}[/]"
    if columns is not None:
        of_column = amounts(row)
        for amount in map(of_column.__getitem__, columns):
            yield format_bytes(amount) if amount else "–"
        yield format_bytes(row.evaluation_bytes)
    if report.memory_bytes is None:
        return
    yield "[green]fits[/]" if fits else "[red]no[/]"
    yield _number(row.largest_batch, MOST_SAMPLES)
    if report.length is not None:
        yield _number(row.longest_sequence, None)


def _number(found: int | None, most: int | None) -> str:
    if found is None:
        return ""
    return f"≥ {found}" if found == most else str(found) if found else "none"
