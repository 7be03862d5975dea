"""Does code that people write for a plain model do the same with a prepared one, or say why not?

Every row is a few steps of training code, run with a plain model of which only the selected channels are trained, and
with a prepared one. Their weights are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from benchmarks.habits import ROWS, Outcome, try_row
from benchmarks.options import add_json, console_for, main, write_json
from trady.report.units import format_bytes


def table_of(outcomes: Sequence[Outcome], *, whole: bool) -> Table:
    """Show what happened."""
    table = Table("idiom", "expected", "happened", "error", "budget")
    for found in outcomes:
        error = "–" if found.error is None else f"{found.error:.0e}"
        budget = "–"
        if found.budget_bytes is not None and found.peak_bytes is not None:
            budget = f"{format_bytes(found.peak_bytes)} of {format_bytes(found.budget_bytes)}"
        happened = found.happened if whole or not found.right else found.happened[:72]
        table.add_row(
            escape(found.idiom), found.expected, escape(happened), error, budget, style=None if found.right else "red"
        )
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Try the rows; fail where one differs from what it expects."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.habits", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose idiom has one of these words")
    parser.add_argument("--whole", action="store_true", help="show messages as a whole")
    add_json(parser)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = console_for(chosen.json)
    rows = [row for row in ROWS if not chosen.only or any(word in row.idiom for word in chosen.only)]
    outcomes = [
        try_row(row) for row in track(rows, "rows", console=Console(stderr=True), disable=not console.is_terminal)
    ]
    console.print(table_of(outcomes, whole=chosen.whole))
    wrong = sum(not found.right for found in outcomes)
    measured = sum(found.peak_bytes is not None for found in outcomes)
    console.print(f"{len(outcomes)} rows, {measured} with a measured budget, {wrong} not as expected")
    write_json(chosen.json, {"outcomes": [asdict(found) for found in outcomes]})
    return int(bool(wrong))


if __name__ == "__main__":
    main(run)
