"""What the documentation site shows beside docs/: README and its like, and links between all of them.

In the repository links lead from file to file. Here a link to a file that is a page leads to the page; one to a file
or folder that the site does not have becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

#: Files outside docs/ that are pages.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/paper/README.md": "benchmarks-paper.md",
}

_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`[^`\n]+`)")
#: A number and its unit stay on one line.
_UNIT = re.compile(r"(?<=\d) (?=(?:[KMGT]iB|kB|MB|GB|×|%|px|ms)(?:\W|$))")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their targets are on the site."""
    place = page.file.src_uri
    source = next((name for name, there in PAGES.items() if there == place), f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        there = _on_site(os.path.normpath(PurePosixPath(source).parent / target))
        if there is None or files.get_file_from_path(there) is None:
            if not (ROOT / PurePosixPath(source).parent / target).exists():
                return link[0]  # a mistake: MkDocs names it
            return link["text"]
        way = os.path.relpath(there, PurePosixPath(place).parent)
        return f"{link['image']}[{link['text']}]({way}{'#' if anchor else ''}{anchor})"

    def mend(text: str) -> str:
        parts = _CODE.split(_LINK.sub(lead, text))
        return "".join(part if part.startswith("`") else _UNIT.sub("\u00a0", part) for part in parts)

    return "".join(part if part.startswith("```") else mend(part) for part in _FENCE.split(markdown))


def _on_site(path: str) -> str | None:
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
