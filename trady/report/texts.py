"""Tables for papers and pull requests: Markdown and LaTeX from the same values as the page's."""

from __future__ import annotations

import re

from trady.report.page import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "<": r"$<$",
    ">": r"$>$",
    "–": "--",
    "…": r"\dots{}",
}
_SPECIAL = re.compile("|".join(re.escape(character) for character in _LATEX))


def markdown(table: Table) -> str:
    """Return a pipe table, its columns padded so that it reads as text too, with the caption above."""
    rows = [[_plain(text) for text in row] for row in (table.header, *table.rows)]
    widths = [max(3, *(len(text) for text in column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    lines = [line(rows[0]), f"|{rule}|", *(line(row) for row in rows[1:])]
    caption = f"{table.caption}\n\n" if table.caption else ""
    return caption + "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Keep a name from ending a cell or beginning an HTML element."""
    return re.sub(r"<(?=[A-Za-z!/?])", r"\\<", text.replace("|", "\\|").replace("\n", " "))


def latex(table: Table) -> str:
    """Return a ``table`` environment for booktabs, which the document must load."""
    columns = "l" + "r" * (len(table.header) - 1)
    body = [" & ".join(escape_latex(text) for text in row) + r" \\" for row in table.rows]
    caption = [rf"\caption{{{escape_latex(table.caption)}}}"] if table.caption else []
    return (
        "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                *caption,
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                " & ".join(escape_latex(text) for text in table.header) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )
        + "\n"
    )


def escape_latex(text: str) -> str:
    """Escape a text so that LaTeX prints it verbatim."""
    return _SPECIAL.sub(lambda found: _LATEX[found[0]], text)
