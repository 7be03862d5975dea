"""The style of figures in reports, and how they are written: equal numbers give equal files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {  # matplotlib's type for it is the list of all its keys
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "trady",  # the same numbers give the same file
    "text.parse_math": False,  # names may hold dollars
}

#: Distinguishable without colour vision too ("muted" of Tol, Colour Schemes, SRON 2021), the strongest first.
COLORS = (
    "#332288", "#cc6677", "#117733", "#88ccee", "#882255", "#44aa99", "#aa4499", "#999933", "#ddcc77",
)  # fmt: skip
GREY = "#8a949b"

#: Dashed lines are reserved for limits and references.
LINES = ("-", ":", "-.")
MARKERS = "osDv^<>PX*"


def label(name: str) -> str:
    """Return a name for a legend, which would leave out one that begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


@dataclass(frozen=True)
class Look:
    """How one series of a figure is drawn.

    Attributes:
        color: Of :data:`COLORS`.
        line: Changes when the colours repeat.
        marker: No two series have both colour and marker in common.
    """

    color: str
    line: str
    marker: str


def looks() -> Iterator[Look]:
    """Looks, one after the other; the first 90 are all different."""
    for place in count():
        line = LINES[place // len(COLORS) % len(LINES)]
        yield Look(COLORS[place % len(COLORS)], line, MARKERS[place % len(MARKERS)])


def as_svg(figure: Figure) -> str:
    """The figure as SVG text, without a date."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def as_png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG, without the version of matplotlib."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    return content.getvalue()
