"""A comparison on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from trady.compare import tables
from trady.compare.summary import Summary
from trady.report.page import Table as Values

#: Maximum number of missing cells that are named; the report lists all.
GAPS = 8


def view(summary: Summary) -> RenderableType:
    """Show the means, the first policy against each other one, and what could not be run."""
    parts: list[RenderableType] = [_table(tables.accuracy_table(summary))]
    if (tests := tables.paired_table(summary, summary.policies[0])).rows:
        parts += ["", _table(tests)]
    failed = [row for row in tables.gap_table(summary).rows if row[1] not in ("missing", "started")]
    if failed:
        shown = Values(["cell", "status", "why"], failed[:GAPS], f"{len(failed)} cells could not be run.")
        parts += ["", _table(shown)]
    return Group(*parts)


def _table(values: Values) -> Table:
    table = Table(caption=escape(values.caption), caption_justify="left")
    for index, name in enumerate(values.header):
        table.add_column(escape(name), justify="left" if index == 0 or name == "why" else "right", overflow="fold")
    for row in values.rows:
        table.add_row(*map(escape, row))
    return table
