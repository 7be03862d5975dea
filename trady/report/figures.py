"""How figures of reports look and are written: the same everywhere, and the same file for the same numbers."""

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
}

#: Told apart without colour vision too ("muted" of Tol, Colour Schemes, SRON 2021), the strongest first.
COLORS = (
    "#332288", "#cc6677", "#117733", "#88ccee", "#882255", "#44aa99", "#aa4499", "#999933", "#ddcc77",
)  # fmt: skip
GREY = "#8a949b"

#: Dashed lines are for what stands beside the series: limits, a reference.
LINES = ("-", ":", "-.")
MARKERS = "osDv^<>PX*"


@dataclass(frozen=True)
class Look:
    """How one series of a figure is drawn.

    Attributes:
        color: Of :data:`COLORS`.
        line: Another one when the colours begin anew.
        marker: No two series have both colour and marker in common.
    """

    color: str
    line: str
    marker: str


def looks() -> Iterator[Look]:
    """One look after the other, no two alike as far as anybody would put into one figure (90)."""
    for place in count():
        line = LINES[place // len(COLORS) % len(LINES)]
        yield Look(COLORS[place % len(COLORS)], line, MARKERS[place % len(MARKERS)])


def as_svg(figure: Figure) -> str:
    """The figure as SVG text, without a date."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def as_png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG, without the version of what drew it."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    return content.getvalue()
