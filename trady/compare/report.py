"""A comparison on disk: values, tables, figures, and one page with all of them."""

from __future__ import annotations

from pathlib import Path

from trady.compare import figures, tables
from trady.compare.results import LINES, TABLE
from trady.compare.summary import Summary
from trady.records.files import write_bytes, write_json, write_lines
from trady.report.figures import STYLE, as_png, as_svg
from trady.report.page import Figure as Picture
from trady.report.page import Section, Text, page
from trady.report.page import Table as PageTable
from trady.report.texts import latex, markdown

WINS_CAPTION = (
    "Wins: in how many tasks (model, data set, budget) the row's mean beats the column's, of how many; in brackets, in "
    "how many of them significantly over the seeds. The colour is the mean lead over all matched cells; * marks the "
    "differences that the paired t-test over all cells calls significant after adjustment."
)
BUDGET_CAPTION = (
    "Accuracy by budget. Dashed lines are policies that take none; dots are single seeds. A point is drawn where every "
    "task it averages has a result."
)


def write_report(summary: Summary, out: Path, title: str) -> Path:
    """Write ``summary.json``, ``tables/``, ``figures/`` and ``report.html``; return the page's path."""
    named = {
        "accuracy": tables.accuracy_table(summary),
        "wins": tables.wins_table(summary),
        "tests": tables.paired_table(summary),
        "tasks": tables.detail_table(summary),
        "costs": tables.cost_table(summary),
        "gaps": tables.gap_table(summary),
    }
    drawings = _draw(summary)
    write_json(out / "summary.json", summary.to_json())
    for folder in ("tables", "figures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, table in named.items():
        write_lines(out / "tables" / f"{name}.md", markdown(table).splitlines())
        write_lines(out / "tables" / f"{name}.tex", latex(table).splitlines())
    for name, (svg, png) in drawings.items():
        write_bytes(out / "figures" / f"{name}.svg", svg.encode())
        write_bytes(out / "figures" / f"{name}.png", png)
    path = out / "report.html"
    write_bytes(path, _page(summary, title, named, {name: svg for name, (svg, _) in drawings.items()}).encode())
    return path


def _page(summary: Summary, title: str, named: dict[str, PageTable], drawings: dict[str, str]) -> str:
    done = sum(row.done for row in summary.rows)
    ran_on = dict.fromkeys(f"{row.device}, torch {row.torch}" for row in summary.rows if row.done and row.device)
    lead = (
        f"{done} of {len(summary.rows)} cells are done: {len(summary.policies)} policies, budgets "
        f"{', '.join(budget or 'none' for budget in summary.budgets)}."
        + (f" Run on {'; '.join(ran_on)}." if ran_on else "")
        + f" One row a cell is in {LINES} and {TABLE} beside this page."
    )
    sections = [
        Section(
            "Accuracy",
            [named["accuracy"], Picture(drawings["accuracy-by-budget"], BUDGET_CAPTION), named["tasks"]],
        ),
        Section("Who beats whom", [Picture(drawings["wins"], WINS_CAPTION, width=760), named["tests"]]),
        Section("What it takes", [named["costs"]]),
        Section("Cells without a result", [named["gaps"] if summary.gaps else Text("None.")]),
    ]
    return page(title, lead, sections)


def _draw(summary: Summary) -> dict[str, tuple[str, bytes]]:
    """Return each figure as SVG and as PNG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        drawn = {"wins": figures.wins_figure(summary), "accuracy-by-budget": figures.budget_figure(summary)}
        return {name: (as_svg(figure), as_png(figure, 160)) for name, figure in drawn.items()}
