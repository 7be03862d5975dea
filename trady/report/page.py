"""One HTML file with everything in it: headings, figures as inline SVG, tables. No script, no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 60rem; overflow-wrap: anywhere; background: #fff; color: #1c2730;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .5rem; border-top: 1px solid #d5dde3; padding-top: 1rem; }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; max-width: var(--width); height: auto; display: block; margin: 0 auto; }
figcaption { margin-top: .4rem; color: #4a5a66; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4eaee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.facts td { white-space: normal; }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; } }
thead th { border-bottom: 2px solid #b9c5cd; }
pre { overflow-x: auto; background: #f3f6f8; padding: .6rem .8rem; font-size: .85rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
a { color: #14566e; }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid #14566e; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; }
  body { background: #14191d; color: #dfe7ec; }
  h2 { border-color: #3a464f; }
  figcaption { color: #a9b7c1; }
  th, td { border-color: #2c363d; }
  thead th { border-color: #55636d; }
  pre { background: #20282e; }
  a { color: #8fcbe4; }
  figure svg { background: #fff; border-radius: 4px; }
  .scroll:focus-visible, pre:focus-visible { outline-color: #8fcbe4; }
}
@media print { h2, figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str

    def html(self, number: int) -> str:
        """Return the paragraph."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Code:
    """Text that is typed or printed, verbatim."""

    text: str

    def html(self, number: int) -> str:
        """Return the block."""
        return f'<pre tabindex="0">{escape(self.text)}</pre>'


@dataclass(frozen=True)
class Figure:
    """A picture and what it shows.

    Attributes:
        svg: An SVG document, as matplotlib writes it.
        caption: What it shows, and how that was measured.
        width: Largest width on a wide screen, in CSS pixels.
    """

    svg: str
    caption: str
    width: int = 900

    def html(self, number: int) -> str:
        """Return the picture, its ids made unique on the page."""
        drawing = own_ids(self.svg[self.svg.index("<svg") :], f"f{number}-")
        label = escape(self.caption, quote=True)
        drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        caption = f"<figcaption>{escape(self.caption)}</figcaption>"
        return f'<figure style="--width:{self.width}px">{drawing}{caption}</figure>'


@dataclass(frozen=True)
class Table:
    """A table of numbers, formatted for people.

    Attributes:
        header: Names of the columns; empty ones are for facts, a name and a text in each row.
        rows: One text a column each; the first is left-aligned.
        caption: What the numbers are.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def html(self, number: int) -> str:
        """Return the table, which scrolls sideways where the screen is narrow."""
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in self.header) if any(self.header) else ""
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>\n" for row in self.rows)
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        label, kind = escape(self.caption or "table", quote=True), "" if head else ' class="facts"'
        return (
            f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{kind}>'
            f"{f'<thead><tr>{head}</tr></thead>' if head else ''}\n<tbody>{body}</tbody></table></div>"
            f"{caption}</figure>"
        )


Part = Text | Code | Figure | Table


@dataclass(frozen=True)
class Section:
    """A heading and its content."""

    heading: str
    parts: Sequence[Part]


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a complete HTML document.

    Args:
        title: Of the document, and its first heading.
        lead: The first paragraph.
        sections: In order; links to them are below the first paragraph.
    """
    numbers = count()
    links = " ".join(f'<a href="#s{index}">{escape(section.heading)}</a>' for index, section in enumerate(sections))
    body = "\n".join(
        f'<section id="s{index}"><h2>{escape(section.heading)}</h2>\n'
        + "\n".join(part.html(next(numbers)) for part in section.parts)
        + "</section>"
        for index, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def own_ids(svg: str, prefix: str) -> str:
    """Prefix every id in an SVG and every reference to one, so that several can share a page."""
    named = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    linked = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', named)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", linked)
