"""Kinds of names in a matrix file, each checked in its place, so that all mistakes are found at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ValidationInfo

from trady.errors import TradyError
from trady.planning.budget import parse_budget
from trady.policies import Scheme, get_policy
from trady.ranking.priors import KNOWN, read_ranking

T = TypeVar("T")

_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Surroundings:
    """The context in which a matrix file is read.

    Attributes:
        folder: The file's folder; paths in the file start there.
        environment: For ``${NAME}``.
        declared: The names in the file's own tables, by ``model``, ``dataset``, ``budget`` and ``policy``,
            as far as they can be read from a file with mistakes.
        check_sources: Whether models and data sets must be there now.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    declared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    check_sources: bool = True

    def expand(self, text: str) -> str:
        """Replace ``${NAME}`` by the values of the environment.

        Raises:
            ValueError: A variable is not set.
        """
        missing = [name for name in _VARIABLE.findall(text) if not self.environment.get(name)]
        if missing:
            raise ValueError(f"{' and '.join(missing)} is not set in the environment")
        return _VARIABLE.sub(lambda found: self.environment[found[1]], text)

    def path(self, text: str) -> str:
        """Return the full path of a path in the file."""
        return str(self.folder / Path(self.expand(text)).expanduser())

    def dataset(self, text: str) -> str:
        """Return a data set's source as ``trady.finetune`` reads it: a known name, or a full path."""
        from trady.training.data.source import is_name

        expanded = self.expand(text)
        return expanded if is_name(expanded) else self.path(text)

    def ranking(self, text: str) -> str:
        """Return a word that stands for a ranking, or a full path."""
        return text if text in KNOWN else self.path(text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return what to say after an unknown name: the nearest known one, and all of them."""
    possible = tuple(known)
    near = get_close_matches(name, possible, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}there are {', '.join(possible) or 'none'}"


def _with_message(call: Callable[[], T]) -> T:
    """Call, and turn an error of trady into the text of a mistake."""
    try:
        return call()
    except TradyError as error:
        raise ValueError(str(error)) from error


def _surroundings(info: ValidationInfo) -> Surroundings:
    if not isinstance(info.context, Surroundings):
        raise TypeError("a matrix is read with read_matrix, which says where its paths start")
    return info.context


def _model(text: str, info: ValidationInfo) -> str:
    around = _surroundings(info)
    expanded = around.expand(text)
    if around.check_sources:
        from trady.training.models.load import check_model

        _with_message(lambda: check_model(expanded))
    return text


def _dataset(text: str, info: ValidationInfo) -> str:
    around = _surroundings(info)
    source = around.dataset(text)
    if around.check_sources:
        from trady.training.data.load import check_source

        _with_message(lambda: check_source(source))
    return text


def _ranking(text: str, info: ValidationInfo) -> str:
    source = _surroundings(info).ranking(text)
    _with_message(lambda: read_ranking(source))
    return text


def _scheme(text: str, info: ValidationInfo) -> str:
    path = _surroundings(info).path(text)
    _with_message(lambda: Scheme.load(path))
    return text


def _budget(text: str) -> str:
    return _with_message(lambda: str(parse_budget(text)))


def _policy(name: str) -> str:
    return _with_message(lambda: get_policy(name).name)


def _declared(kind: str) -> AfterValidator:
    def check(name: str, info: ValidationInfo) -> str:
        known = _surroundings(info).declared[kind]
        if name not in known:
            raise ValueError(f"no {kind} {name!r} in this file; {did_you_mean(name, known)}")
        return name

    return AfterValidator(check)


class Names:
    """The kinds, as types of pydantic."""

    Model = Annotated[str, AfterValidator(_model)]
    Dataset = Annotated[str, AfterValidator(_dataset)]
    Ranking = Annotated[str, AfterValidator(_ranking)]
    Scheme = Annotated[str, AfterValidator(_scheme)]
    Budget = Annotated[str, AfterValidator(_budget)]
    Policy = Annotated[str, AfterValidator(_policy)]
    DeclaredModel = Annotated[str, _declared("model")]
    DeclaredDataset = Annotated[str, _declared("dataset")]
    DeclaredBudget = Annotated[str, _declared("budget")]
    DeclaredPolicy = Annotated[str, _declared("policy")]
