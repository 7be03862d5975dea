"""The picture of an estimate: a bar a method, cut into what its peak is made of, and the memory that there is."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from trady.estimates.report import FitReport
from trady.estimates.table import COLUMNS, amounts, batch_of
from trady.estimates.unsuitable import needs
from trady.report.figures import COLORS, GREY, STYLE
from trady.report.units import BINARY_UNITS, format_bytes

#: File endings that matplotlib writes here.
ENDINGS = (".svg", ".png", ".pdf")


def check_ending(path: str) -> None:
    """Refuse a file that no picture can be written to.

    Raises:
        FileError: Its ending is none of :data:`ENDINGS`.
    """
    from trady.errors import FileError

    if Path(path).suffix.lower() not in ENDINGS:
        raise FileError(f"--plot {path}: the ending says what is written; type one of {', '.join(ENDINGS)}")


def draw(report: FitReport, path: str) -> None:
    """Write the picture.

    Args:
        report: The estimate; methods without figures are left out.
        path: Ends in ``.svg``, ``.png`` or ``.pdf``.

    Raises:
        MissingPackageError: matplotlib is not installed.
        FileError: The file has another ending.

    """
    check_ending(path)
    needs("matplotlib", "plots")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.refused is None]
    top = max([row.peak_bytes for row in rows] + [report.memory_bytes or 0], default=1)
    unit, size = next(((name, size) for name, size in BINARY_UNITS.items() if top >= 2 * size), ("B", 1))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.3 + 0.36 * len(rows)), layout="constrained")
        axis = figure.add_subplot()
        left = [0.0] * len(rows)
        for column, color in zip(COLUMNS, COLORS, strict=False):
            widths = [amounts(row)[column] / size for row in rows]
            if any(widths):
                axis.barh(range(len(rows)), widths, 0.68, left, color=color, label=column)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, row in enumerate(rows):
            axis.text(left[place], place, f" {format_bytes(row.peak_bytes)}", va="center", fontsize=8.5)
        if report.memory_bytes is not None:
            axis.axvline(report.memory_bytes / size, color=GREY, linewidth=1.2, linestyle="--")
            axis.annotate(
                format_bytes(report.memory_bytes), (report.memory_bytes / size, 1), (3, 2), color=GREY, fontsize=8,
                xycoords=("data", "axes fraction"), textcoords="offset points",
            )  # fmt: skip
        axis.set_yticks(range(len(rows)), [row.title for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.14 * top / size)
        axis.set_xlabel(f"peak of a training step, {unit}")
        title = f"{report.model}, {report.dtype}, {batch_of(report)}, {report.optimizer}"
        axis.set_title(fill(title, 100), pad=14)
        figure.legend(loc="outside lower center", ncols=len(COLUMNS), fontsize=8.5)
        figure.savefig(path, dpi=150)
