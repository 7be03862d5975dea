"""Options in a file: ``--config run.toml``, ``--set lr=0.05``, and what a run was started with, written down."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from trady.cli.choices import unknown
from trady.cli.options import OUTPUT
from trady.errors import FileError, TradyError

#: What belongs to a call and not to a run.
_NOT_KEPT = frozenset({"config", "setting", "resume", "overwrite", "as_json", "quiet", "log_file"})

_READ = "trady options of a file"


def _from_file(context: typer.Context, path: str | None) -> str | None:
    if path is not None and not context.resilient_parsing:
        _take(context, _read(Path(path)), path)
    return path


def _from_words(context: typer.Context, words: list[str] | None) -> list[str] | None:
    if words and not context.resilient_parsing:
        for word in words:
            key, equals, value = word.partition("=")
            if not (key.strip() and equals):
                raise TradyError(f"--set {word!r} is not KEY=VALUE; type e.g. --set lr=0.05")
            _take(context, {key.strip(): _value(value.strip())}, "--set")
    return words


Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="A TOML file with options by their names, model and dataset too; what is typed goes before it.",
        callback=_from_file,
        is_eager=True,
        rich_help_panel=OUTPUT,
    ),
]

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option by its name in the file, which goes before the file; repeat for more.",
        callback=_from_words,
        is_eager=True,
        rich_help_panel=OUTPUT,
    ),
]


def _read(path: Path) -> Mapping[str, Any]:
    from trady.records.reading import read_bytes

    name = "tomllib" if find_spec("tomllib") is not None else "tomli"  # Python 3.10 has none of its own
    if find_spec(name) is None:
        raise TradyError("--config needs a reader of TOML: pip install tomli, or Python 3.11")
    try:
        found: Mapping[str, Any] = import_module(name).loads(read_bytes(path).decode("utf-8"))
        return found
    except OSError as error:
        raise FileError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of UTF-8 and of TOML
        raise FileError(f"--config {path} is no TOML file: {error}") from error


def _value(text: str) -> Any:
    """Return what a word means in TOML: a number, a truth, a list; a text where it is none of these."""
    if re.fullmatch(r"true|false", text):
        return text == "true"
    try:
        return json.loads(text)
    except ValueError:
        return text


def _take(context: typer.Context, given: Mapping[str, Any], where: str) -> None:
    """Make values the defaults of a command."""
    known = {str(each.name) for each in context.command.params} - {"config", "setting", "help"}
    taken: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name == "json":
            name = "as_json"
        if isinstance(value, dict):
            raise TradyError(f"{where}: [{key}] is a table, and options stand by themselves: lr = 0.05")
        if name not in known:
            raise TradyError(unknown(f"{where}: {key!r}", name, sorted(known)))
        taken[name] = value if isinstance(value, (bool, list)) else str(value)
    own = context.meta.setdefault(_READ, {"--set": {}, "file": {}})
    own["--set" if where == "--set" else "file"].update(taken)
    context.default_map = {**(context.default_map or {}), **own["file"], **own["--set"]}


def as_toml(context: typer.Context) -> str:
    """Return the options of a run as a file that ``--config`` reads, in the order of the command's own."""
    params = {str(each.name): context.params.get(str(each.name)) for each in context.command.params}
    lines = [f"{name} = {_written(value)}" for name, value in params.items() if _is_kept(name, value)]
    return "\n".join(["# Read by trady finetune --config", *lines, ""])


def _is_kept(name: str, value: Any) -> bool:
    return name not in _NOT_KEPT and value is not None and value != [] and value != ()


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value, ensure_ascii=False)
