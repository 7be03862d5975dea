"""Which layers matter: scores from gradients, and the top-K pool.

Observation 2 of TraDy (arXiv 2510.19675): the ranking of layers by reweighted gradient norm
(RGN) belongs to the architecture, so it is measured once, shipped, or learnt while training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from trady.channels.table import ChannelTable
from trady.errors import RankingError
from trady.ranking.scores import Metric, spearman, top_layers
from trady.records.files import write_json
from trady.records.versioned import Format

Source = Literal["measured", "online", "prior", "structural", "given"]

Norm = Literal["frozen", "batch", ""]

#: What version 2 of the rankings' records is about.
SCORE = "since version 2, the score of a layer is equation 8 of arXiv 2510.19675, the sum of its channels' RGN"
#: The ranking as JSON.
FORMAT = Format(
    "trady-ranking", "layer ranking", RankingError, "measure it again with trady rank", version=2, changed=SCORE
)


@dataclass(frozen=True)
class _Record:
    """The entries of a ranking's file, all of them; :class:`LayerRanking` explains them."""

    scores: Mapping[str, float]
    metric: Metric
    source: Source
    structure: str
    channels: Mapping[str, tuple[float, ...]]
    batches: int
    elements: Mapping[str, int]
    measured_on: str
    norm: Norm


def structure_digest(table: ChannelTable) -> str:
    """Sixteen hexadecimal digits of the layers' kinds, weight shapes and groups, in order of execution.

    Names, batch size and input resolution do not enter: a prior is found again whatever the
    model calls its layers and whatever it is fed.
    """
    described = [[layer.kind, list(layer.weight_shape), layer.groups] for layer in table]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LayerRanking:
    """How much each layer matters.

    Attributes:
        scores: Layer name to score, in order of execution; finite, not negative.
        metric: ``rgn`` (see :func:`layer_rgn`) or ``norm`` (the same without the cost).
        source: ``measured`` on the user's task, ``online`` while training, ``prior`` found by the model's
            structure (:mod:`trady.ranking.priors`), ``structural`` guessed from it, ``given`` by the user.
        structure: :func:`structure_digest` of the model it was taken from; may be empty.
        channels: Layer name to the score of each input channel (see :func:`channel_rgn`); may be
            empty or lack layers.
        batches: Number of batches that the gradients came from.
        elements: Layer name to C^W + C^A of a channel where it was measured, so that :meth:`at` can
            take the scores to inputs of another size; may be empty.
        measured_on: What it was measured on, for people; may be empty.
        norm: How batch normalisations ran while it was measured: ``frozen``, with their running statistics, or
            ``batch``, with those of the batch; empty where it is not known or nothing ran.

    Raises:
        RankingError: When a value is not as above.
    """

    scores: Mapping[str, float]
    metric: Metric = "rgn"
    source: Source = "given"
    structure: str = ""
    channels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    batches: int = 0
    elements: Mapping[str, int] = field(default_factory=dict)
    measured_on: str = ""
    norm: Norm = ""

    def __post_init__(self) -> None:
        for what, value, possible in (
            ("metric", self.metric, get_args(Metric)),
            ("source", self.source, get_args(Source)),
            ("norm", self.norm, get_args(Norm)),
        ):
            if value not in possible:
                raise RankingError(f"{what} {value!r} does not exist; there are {', '.join(possible)}")
        for what, text in (("structure", self.structure), ("measured_on", self.measured_on)):
            if type(text) is not str:
                raise RankingError(f"{what} is {text!r}; it is a text")
        if type(self.batches) is not int or self.batches < 0:
            raise RankingError(f"batches is {self.batches!r}; it is a number from 0")
        strangers = (set(self.channels) | set(self.elements)) - set(self.scores)
        if strangers:
            raise RankingError(f"channel scores or elements of layers without a score: {listed(strangers)}")
        for name, count in self.elements.items():
            if type(count) is not int or count < 1:
                raise RankingError(f"a channel of layer {name!r} takes {count!r} elements; it is a number from 1")
        scores = {name: _score(value, f"layer {name!r}") for name, value in self.scores.items()}
        channels = {
            name: tuple(_score(value, f"a channel of layer {name!r}") for value in values)
            for name, values in self.channels.items()
        }
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "channels", channels)

    @property
    def order(self) -> tuple[str, ...]:
        """Layer names by falling score; equal scores in order of execution."""
        return tuple(sorted(self.scores, key=lambda name: -self.scores[name]))

    def top(self, share: float = 0.97, without: Collection[str] = ()) -> tuple[str, ...]:
        """The top-K of all layers but some, in falling order: see :func:`top_layers`."""
        return top_layers({name: score for name, score in self.scores.items() if name not in without}, share)

    def spearman(self, other: LayerRanking) -> float:
        """Rank correlation with another ranking of the same layers: see :func:`spearman`.

        Raises:
            RankingError: When the layers differ.
        """
        same_layers(other.scores, self.scores, "the other ranking")
        return spearman(list(self.scores.values()), [other.scores[name] for name in self.scores])

    def check(self, table: ChannelTable) -> None:
        """Make sure that this ranks the layers of a table: all of them, and no others.

        Raises:
            RankingError: When it does not; the message names the layers that are missing or unknown, or the layer
                that has another number of channels.
        """
        same_layers(self.scores, table.names, "the ranking")
        for name, values in self.channels.items():
            if len(values) != table[name].channels:
                raise RankingError(
                    f"the ranking has {len(values)} channels of layer {name!r}, the model "
                    f"{table[name].channels}; measure it on this model with trady.rank"
                )

    def at(self, table: ChannelTable) -> LayerRanking:
        """This ranking for inputs of the table's size.

        RGN is a gradient norm over C^W + C^A, and C^A grows with the input. The norms are kept, since their order
        hardly changes with the input's size, and are divided by the table's own costs.

        Raises:
            RankingError: When it is of other layers, see :meth:`check`.
        """
        self.check(table)
        if self.metric != "rgn" or not self.elements:
            return self
        factor = {name: count / table[name].elements for name, count in self.elements.items()}
        if all(value == 1 for value in factor.values()):
            return self
        return replace(
            self,
            scores={name: score * factor.get(name, 1.0) for name, score in self.scores.items()},
            channels={
                name: tuple(value * factor.get(name, 1.0) for value in values) for name, values in self.channels.items()
            },
            elements={name: table[name].elements for name in self.elements},
        )

    def adopted(self, table: ChannelTable) -> LayerRanking:
        """This ranking under the names of a table of the same structure, layer by layer in order.

        Raises:
            RankingError: When the structures differ.
        """
        expected = structure_digest(table)
        if self.structure != expected or len(self.scores) != len(table):
            raise RankingError(
                f"the ranking is of a model of structure {self.structure or 'unknown'}, this one is "
                f"{expected}; measure it on this model with trady.rank"
            )
        renamed = dict(zip(self.scores, table.names, strict=True))
        return replace(
            self,
            scores={renamed[name]: score for name, score in self.scores.items()},
            channels={renamed[name]: values for name, values in self.channels.items()},
            elements={renamed[name]: count for name, count in self.elements.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` reads back to an equal ranking."""
        return {
            **FORMAT.header(),
            "metric": self.metric,
            "source": self.source,
            "structure": self.structure,
            "batches": self.batches,
            "measured_on": self.measured_on,
            "norm": self.norm,
            "scores": dict(self.scores),
            "elements": dict(self.elements),
            "channels": {name: list(values) for name, values in self.channels.items()},
        }

    @classmethod
    def from_json(cls, data: object) -> LayerRanking:
        """Read what :meth:`to_json` wrote.

        Raises:
            RankingError: When it is something else, of another version, or damaged.
        """
        record = FORMAT.read(_Record, data)
        with FORMAT.reading():
            return cls(**vars(record))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file of that name is replaced completely or not at all.

        Raises:
            FileError: When the file cannot be written.
            ResourceError: When the disk is full.
        """
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerRanking:
        """Read what :meth:`save` wrote.

        Raises:
            RankingError: When the file cannot be read, is damaged, or is of another version.
        """
        return FORMAT.load(path, cls.from_json)


def _score(value: object, whose: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RankingError(f"the score of {whose} is {value!r}; it is a number")
    try:
        score = float(value)
    except OverflowError:
        score = float("inf")
    if not np.isfinite(score) or score < 0:
        raise RankingError(f"the score of {whose} is {value}; scores are finite and not negative")
    return score


def same_layers(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse layers that are missing or unknown."""
    given, expected = set(given), set(expected)
    problems = []
    if given - expected:
        problems.append(f"names layers that do not exist here: {listed(given - expected)}")
    if expected - given:
        problems.append(f"misses layers: {listed(expected - given)}")
    if problems:
        raise RankingError(f"{what} {' and '.join(problems)}; is it of another model?")


def listed(names: Collection[str], most: int = 8) -> str:
    """Return the first ``most`` names as text, and how many more there are."""
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
