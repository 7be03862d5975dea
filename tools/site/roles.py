"""Docstrings as the site shows them: ``:func:`trady.prepare``` is a link where the reference has the thing.

Docstrings of trady name things with the roles of Sphinx, which editors and ``help()`` show well enough. MkDocs knows
Markdown: a role becomes an optional reference, which is a link if some page has its target and code if none has.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

import griffe

_BLOCK = re.compile(r"::(?=\n\n +)")
_PAGE = re.compile(r"\bdocs/(?P<page>[a-z-]+)\.md\b")
_ROLE = re.compile(r":(?P<role>[a-z]+):`(?P<text>[^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the roles of every docstring, once all of trady is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through everything that has a docstring."""
        _rewrite(pkg, set())


def _rewrite(thing: griffe.Object | griffe.Alias, seen: set[str]) -> None:
    if thing.is_alias or thing.path in seen:
        return
    seen.add(thing.path)
    if thing.docstring is not None:
        text = _ROLE.sub(lambda role: _reference(role, thing), thing.docstring.value)
        text = _BLOCK.sub(":", text)
        thing.docstring.value = _PAGE.sub(r"[\g<page>](../\g<page>.md)", text)  # the reference is one folder deep
    for member in thing.members.values():
        _rewrite(member, seen)


def _reference(role: re.Match[str], thing: griffe.Object | griffe.Alias) -> str:
    text = role["text"]
    if role["role"] == "math":
        return f"`{text}`"
    name = text.removeprefix("~")
    shown = name.rpartition(".")[2] if text.startswith("~") else name
    code = f"<code>{escape(shown)}{'()' if role['role'] in ('func', 'meth') else ''}</code>"
    return f'<autoref identifier="{escape(_full_name(name, thing))}" optional>{code}</autoref>'


def _full_name(name: str, thing: griffe.Object | griffe.Alias) -> str:
    """Where a name leads, seen from inside a docstring: a member of the class or of the module, or a path."""
    if name.startswith("trady."):
        return name
    first, _, rest = name.partition(".")
    scope: Any = thing
    while scope is not None:
        if first in scope.members:
            return ".".join(filter(None, (scope.path, first, rest)))
        scope = scope.parent
    try:
        return thing.resolve(name)
    except griffe.NameResolutionError:
        return name
