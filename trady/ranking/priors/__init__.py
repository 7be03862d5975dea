"""Layer rankings known before training, found by a model's structure.

The ranking of layers hardly changes between tasks (arXiv 2510.19675, observation 2), so one that was measured once
serves every fine-tuning of an architecture. Some are shipped in this folder (``python -m benchmarks.priors`` makes
them); ``trady rank`` adds those of a user. A prior is found by the kinds and shapes of layers, never by names, and a
prior of another structure is never used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from trady.channels.table import ChannelTable
from trady.errors import RankingError
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.ranking.structural import structural_ranking

#: What may be asked for instead of a ranking: learn it in the first epoch, or guess it from shapes.
Known = Literal["online", "structural"]

KNOWN: tuple[Known, ...] = ("online", "structural")

_SHIPPED = Path(__file__).parent


def ranking_for(table: ChannelTable, asked: LayerRanking | str | None) -> LayerRanking | None:
    """The ranking to draw by; ``None`` means that it is to be learnt online.

    Args:
        table: The updatable layers.
        asked: A ranking, one of :data:`KNOWN`, or ``None`` for a prior if there is one.

    Raises:
        RankingError: The ranking is of another model, or the word is not known.
    """
    if isinstance(asked, LayerRanking):
        return asked.at(table)
    if asked is None:
        return find_prior(table)
    if asked == "structural":
        return structural_ranking(table)
    if asked == "online":
        return None
    raise RankingError(
        f"ranking={asked!r} is not known; give a LayerRanking (trady.rank, LayerRanking.load), "
        f"one of {', '.join(map(repr, KNOWN))}, or None for a prior"
    )


def find_prior(table: ChannelTable) -> LayerRanking | None:
    """The prior of a model's structure, for inputs of the table's size; ``None`` if there is none.

    A user's own goes before a shipped one. In distributed training only shipped ones are looked at, since the
    processes may have different homes; pass ``ranking=`` there.

    Raises:
        RankingError: A file is damaged; the message says which.
    """
    structure = structure_digest(table)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    own = prior_folder() / f"{structure}.json"
    if alone and own.is_file():
        return _applied(LayerRanking.load(own), table)
    found = (ranking for ranking in shipped_priors().values() if ranking.structure == structure)
    return next((_applied(ranking, table) for ranking in found), None)


def read_ranking(given: str) -> LayerRanking | Known:
    """The ranking of a file that ``trady rank`` has written, or the word of :data:`KNOWN` that was given for one.

    Raises:
        RankingError: The file cannot be read as a ranking.
    """
    return next((word for word in KNOWN if word == given), None) or LayerRanking.load(given)


@cache
def shipped_priors() -> Mapping[str, LayerRanking]:
    """The priors that come with trady, by the name of the architecture; read once."""
    return MappingProxyType({path.stem: LayerRanking.load(path) for path in sorted(_SHIPPED.glob("*.json"))})


def save_prior(ranking: LayerRanking) -> Path:
    """Keep a measured ranking where :func:`find_prior` finds it; one of the same structure is replaced.

    Returns:
        The file.

    Raises:
        RankingError: The ranking does not say what structure it is of, or the file cannot be written.
    """
    if not ranking.structure:
        raise RankingError("the ranking does not say what structure it is of; measure it with trady.rank")
    folder = prior_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RankingError(f"cannot make the folder of priors {folder}: {error.strerror or error}") from error
    path = folder / f"{ranking.structure}.json"
    replace(ranking, channels={}).save(path)
    return path


def prior_folder() -> Path:
    """Where a user's own priors lie: ``$TRADY_PRIORS``, else ``trady/priors`` in the user's data folder."""
    if given := os.environ.get("TRADY_PRIORS"):
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(data) if data else Path.home() / ".local" / "share") / "trady" / "priors"


def _applied(ranking: LayerRanking, table: ChannelTable) -> LayerRanking:
    return replace(ranking.adopted(table).at(table), source="prior")
