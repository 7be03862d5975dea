"""Messages of the library in the syntax of the command line: ``budget="300 MiB"`` becomes ``--budget "300 MiB"``."""

from __future__ import annotations

import re
from collections.abc import Collection

#: A value as Python writes it: quoted, or a word.
_VALUE = r"""("[^"]*"|'[^']*'|[\w.]+)"""


def as_typed(message: str, options: Collection[str]) -> str:
    """Return a message that speaks of a command's options as they are typed.

    Args:
        message: What the library says; arguments of its functions are named as in Python.
        options: Names of the command's options, with underscores.
    """
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    # What stands behind an option for the sake of Python: --resume (resume=True).
    message = re.sub(rf"(--[\w-]+(?: [\w.]+)?) \((?:(?:{names})=(?:{_VALUE})?(?:, )?)+\)", r"\1", message)
    message = re.sub(rf"(?<![\w.-])({names})={_VALUE}", _option, message)
    parts = [name for name in options if "_" in name]
    words = rf"(?<![\w./-])({'|'.join(parts)})(?![\w./(=-])" if parts else r"(?!)"
    message = re.sub(words, lambda found: f"--{found[1].replace('_', '-')}", message)
    return re.sub(rf"^({names}) (?=is )", lambda found: f"--{found[1].replace('_', '-')} ", message)


def _option(found: re.Match[str]) -> str:
    name, value = f"--{found[1].replace('_', '-')}", found[2]
    if value == "True":
        return name
    bare = value[1:-1] if value[:1] in "\"'" else value
    return f"{name} {bare}" if re.fullmatch(r"[\w.,-]+", bare) else f'{name} "{bare}"'
