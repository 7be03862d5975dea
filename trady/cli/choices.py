"""Words that an option takes: checked while the line is read, before anything heavy is imported, and completed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from trady.errors import DataError, ModelError, RankingError, TradyError

#: Models that are known by a name of their own.
MODELS = ("efficientnet-lite0",)

#: Data sets that are.
DATASETS = ("fashion-mnist",)

#: Words that stand for a ranking.
RANKINGS = ("online", "structural")

#: Endings of files that hold a data set.
DATA_ENDINGS = (".npz",)

#: How much alike a name has to be to be taken for a typo of a known one.
_ALIKE = 0.8


def choice(*names: str, possible: Sequence[str], panel: str, text: str) -> Any:
    """Return an option that takes one of some words.

    Args:
        names: How it is typed; by default as the parameter is called.
        possible: The words.
        panel: Where ``--help`` shows it.
        text: What ``--help`` says.
    """

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in possible:
            raise TradyError(unknown(f"{param.opts[0]} {value!r}", value, possible))
        return value

    return typer.Option(*names, help=text, rich_help_panel=panel, callback=check, autocompletion=completing(possible))


def unknown(what: str, given: str, possible: Iterable[str]) -> str:
    """Say that a word is not known, which one is nearest, and what there is."""
    words = list(possible)
    near = get_close_matches(given.lower(), words, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{what} is not known; {meant}there are {', '.join(words)}"


def completing(possible: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what completes a word in a shell."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in possible if word.startswith(incomplete)]

    return complete


def complete_model(incomplete: str) -> list[str]:
    """Complete a model: known names, folders of runs and of transformers, a ``config.json``."""
    folders = [path for path in _paths(incomplete) if path.is_dir() or path.name == "config.json"]
    return [name for name in MODELS if name.startswith(incomplete)] + [_shown(path) for path in folders]


def complete_dataset(incomplete: str) -> list[str]:
    """Complete a data set: known names, folders and files."""
    files = [path for path in _paths(incomplete) if path.is_dir() or path.suffix.lower() in DATA_ENDINGS]
    return [name for name in DATASETS if name.startswith(incomplete)] + [_shown(path) for path in files]


def _paths(incomplete: str) -> list[Path]:
    folder, _, start = incomplete.rpartition("/")
    try:
        inside = sorted(Path(f"{folder}/" if folder or incomplete.startswith("/") else ".").iterdir())
    except OSError:
        return []
    hidden = start.startswith(".")
    return [path for path in inside if path.name.startswith(start) and (hidden or path.name[0] != ".")]


def _shown(path: Path) -> str:
    return f"{path}/" if path.is_dir() else str(path)


def check_model(name: str | None) -> str | None:
    """Refuse a typo of a known model, or of a folder that is here, before the Hub is asked for it.

    Raises:
        ModelError: It is one; the message names what was meant.
    """
    if name is None or Path(name).exists() or ":" in name or name.lower() in MODELS:
        return name
    if meant := _meant(name, MODELS):
        raise ModelError(f"no model {name!r}; did you mean {meant!r}? trady models lists what there is")
    if re.search(r"\s", name) or name.count("/") > 1 or name.endswith(("/", ".json")):
        raise ModelError(f"{name} does not exist; trady models lists what can be named")
    return name


def check_dataset(name: str | None) -> str | None:
    """Refuse a typo of a known data set, or of a folder or file that is here.

    Raises:
        DataError: It is one; the message names what was meant.
    """
    if name is None or Path(name).exists() or name.lower().replace("_", "-") in DATASETS:
        return name
    if meant := _meant(name, DATASETS):
        raise DataError(f"{name} does not exist; did you mean {meant!r}?")
    return name


def _meant(name: str, known: Sequence[str]) -> str | None:
    if near := get_close_matches(name.lower(), known, n=1, cutoff=_ALIKE):
        return near[0]
    path = Path(name.rstrip("/"))
    try:
        beside = [each.name for each in path.parent.iterdir() if each.name[0] != "."]
    except OSError:
        return None
    near = get_close_matches(path.name, beside, n=1, cutoff=_ALIKE)
    return str(path.parent / near[0]) if near else None


def complete_ranking(incomplete: str) -> list[str]:
    """Complete a ranking: the words that stand for one, and files."""
    files = [path for path in _paths(incomplete) if path.is_dir() or path.suffix == ".json"]
    return [word for word in RANKINGS if word.startswith(incomplete)] + [_shown(path) for path in files]


def check_ranking(given: str | None) -> str | None:
    """Refuse what is neither a word for a ranking nor a file.

    Raises:
        RankingError: It is a typo of one, or is not there.
    """
    if given is None or given in RANKINGS or Path(given).exists():
        return given
    meant = _meant(given, RANKINGS)
    what = f"did you mean {meant!r}? " if meant else ""
    raise RankingError(
        f"--ranking {given!r} is no file and is not known; {what}there are {', '.join(RANKINGS)}, and files that trady "
        "rank has written"
    )
