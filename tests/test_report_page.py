from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure as Picture

from trady.report.page import Code, Figure, Section, Table, Text, own_ids, page


def svg() -> str:
    from io import StringIO

    figure = Picture()
    figure.add_subplot().plot([0, 1], [2, 3])
    text = StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


class Read(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href", "src"):
                self.references.append(value or "")


@pytest.fixture
def text() -> str:
    drawing = svg()
    parts: list[Text | Code | Figure | Table] = [
        Text("a < b"),
        Code("$ x"),
        Figure(drawing, 'one "line"'),
        Figure(drawing, "the same"),
    ]
    return page(
        "Title & more", "Lead", [Section("First", parts), Section("Second", [Table(["a", "b"], [["1", "<2>"]])])]
    )


def test_two_pictures_of_one_page_share_no_id_and_every_reference_is_met(text: str) -> None:
    read = Read()
    read.feed(text)
    assert len(read.ids) == len(set(read.ids))
    inner = {reference[1:] for reference in read.references if reference.startswith("#")}
    inner |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert inner
    assert inner <= set(read.ids)


def test_a_page_asks_nothing_of_the_network(text: str) -> None:
    read = Read()
    read.feed(text)
    assert all(reference.startswith("#") for reference in read.references)
    assert not {"script", "link", "img", "iframe"} & read.tags


def test_what_is_written_stands_there_as_text(text: str) -> None:
    assert "a &lt; b" in text
    assert "<td>&lt;2&gt;</td>" in text
    assert "<title>Title &amp; more</title>" in text


def test_ids_and_their_references_change_together() -> None:
    given = '<svg id="a"><use xlink:href="#a"/><g clip-path="url(#a)"/></svg>'
    assert own_ids(given, "x-") == '<svg id="x-a"><use xlink:href="#x-a"/><g clip-path="url(#x-a)"/></svg>'
