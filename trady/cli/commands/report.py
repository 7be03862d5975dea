"""``trady report``: what runs have fitted and learned, on one page."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """Example: trady report runs/photos

Or: trady report runs/photos runs/photos-full --out report.html
"""


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders that trady finetune has written.")],
    out: Annotated[
        str | None, typer.Option(help="The file; by default report.html in the folder of the only run.")
    ] = None,
) -> None:
    """Write a page about a run, or several side by side: what fitted, what was learned, where, how to do it again."""
    from trady.outcome.run_page import write_page

    typer.echo(f"written to {write_page(runs, out)}")
