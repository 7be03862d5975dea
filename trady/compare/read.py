"""Reading a matrix file: it is accepted, or refused with a list of all its mistakes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trady.compare.matrix import WITHOUT_BUDGET, Matrix, Override
from trady.compare.names import Surroundings, did_you_mean
from trady.compare.training import Training
from trady.errors import MatrixError
from trady.records.reading import read_bytes
from trady.training.models.here import importable_here

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLES: dict[str, type[BaseModel]] = {"": Matrix, "training": Training, "override": Override}


@dataclass(frozen=True)
class ReadMatrix:
    """A matrix file without mistakes, and what its paths and variables mean here.

    Attributes:
        matrix: What the file says, with the sources given in place of its own.
        around: What its paths and variables mean.
        datasets: The file's own sources, by name: they identify a cell on every machine.
    """

    matrix: Matrix
    around: Surroundings
    datasets: Mapping[str, str]


def read_matrix(
    path: str | Path,
    *,
    datasets: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    check_sources: bool = True,
) -> ReadMatrix:
    """Read a matrix file.

    Args:
        path: The file, in TOML.
        datasets: Sources that take the place of the file's, by the data set's name.
        environment: For ``${NAME}`` in the file; the process' own by default.
        check_sources: Whether the models and data sets must be there; a summary does without them.

    Raises:
        MatrixError: The file cannot be read, or has mistakes; the message lists all of them.
    """
    file = Path(path)
    raw = _parse(file)
    mistakes = _import(raw.get("imports"))
    own = _sources(raw)
    mistakes += _replace(raw, datasets or {})
    around = Surroundings(
        file.resolve().parent, environment if environment is not None else os.environ, _declared(raw), check_sources
    )
    try:
        matrix = Matrix.model_validate(raw, context=around)
    except ValidationError as error:
        mistakes += [_mistake(dict(found)) for found in error.errors()]
    mistakes += _across(raw, around.declared)
    if mistakes:
        unique = list(dict.fromkeys(mistakes))
        count = f"{len(unique)} mistakes" if len(unique) > 1 else "a mistake"
        raise MatrixError(f"{path} has {count}; nothing was run\n" + "\n".join(f"  - {text}" for text in unique))
    return ReadMatrix(matrix, around, own)


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bytes(file).decode("utf-8"))
    except OSError as error:
        raise MatrixError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # TOML and UTF-8, and numbers and dates that do not exist
        raise MatrixError(f"{file} is not TOML: {error}") from error


def _import(modules: object) -> list[str]:
    """Import what the file names; return the mistakes."""
    mistakes = []
    for name in modules if isinstance(modules, list) else []:
        try:
            with importable_here():
                importlib.import_module(str(name))
        except Exception as error:  # a module of the user's own may raise anything
            mistakes.append(f"imports: {name!r} cannot be imported: {type(error).__name__}: {error}")
    return mistakes


def _sources(raw: dict[str, Any]) -> dict[str, str]:
    table = raw.get("datasets")
    if isinstance(table, list):
        raw["datasets"] = table = {str(name): name for name in table}
    return dict(table) if isinstance(table, dict) else {}


def _replace(raw: dict[str, Any], given: Mapping[str, str]) -> list[str]:
    """Replace sources of the file by given ones; return the mistakes."""
    known = _sources(raw)
    for name in filter(known.__contains__, given):
        path = Path(given[name]).expanduser()
        raw["datasets"][name] = str(path.absolute()) if path.exists() else given[name]
    return [f"--dataset: no data set {name!r}; {did_you_mean(name, known)}" for name in given if name not in known]


def _across(raw: Mapping[str, Any], declared: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the mistakes that no single entry shows."""
    mistakes = []
    budgets = raw.get("budgets")
    for name, amounts in budgets.items() if isinstance(budgets, dict) else ():
        missing = [model for model in declared["model"] if isinstance(amounts, dict) and model not in amounts]
        if missing:
            mistakes.append(f"budgets.{name}: no amount for {', '.join(missing)}")
    needy = [name for name in declared["policy"] if name not in WITHOUT_BUDGET]
    if needy and not declared["budget"]:
        mistakes.append(f'budgets: {", ".join(needy)} need one; add e.g. [budgets] small = "elements:27946"')
    for key in ("models", "datasets", "budgets", "policies", "seeds"):
        values = raw.get(key)
        values = values if isinstance(values, list) else []
        twice = {str(value) for value in values if values.count(value) > 1}
        mistakes += [f"{key}: {value} is there twice" for value in sorted(twice)]
    return mistakes


def _declared(raw: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the names of the file's own tables, whatever else is wrong with it."""

    def names(key: str) -> tuple[str, ...]:
        table = raw.get(key)
        return tuple(str(name) for name in table) if isinstance(table, (dict, list)) else ()

    return {key: names(table) for key, table in _OF_KIND.items()}


_OF_KIND = {"model": "models", "dataset": "datasets", "budget": "budgets", "policy": "policies"}


def _mistake(found: Mapping[str, Any]) -> str:
    place = _place(found["loc"])
    text = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "missing":
        return f"{place}: is missing"
    if found["type"] == "extra_forbidden":
        table = str(found["loc"][0]) if len(found["loc"]) > 1 else ""
        known = _TABLES[table].model_fields if table in _TABLES else ()
        return f"{place}: unknown key; {did_you_mean(str(found['loc'][-1]), known)}"
    if found["type"] == "value_error":
        return f"{place}: {text}"
    return f"{place}: {text[:1].lower()}{text[1:]}, not {found['input']!r}"


def _place(location: Iterable[str | int]) -> str:
    """Return where a mistake is, as in ``override[2].lr``, without pydantic's names of types."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part + 1}]"
        elif part.isidentifier() or "-" in part or "." in part or part[:1].isdigit():
            text += f".{part}" if text else part
    return text or "the file"
