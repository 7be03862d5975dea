"""Which layers matter: scores from gradients, the top-K pool, and how far to trust them.

Observation 2 of TraDy (arXiv 2510.19675): the ranking of layers by reweighted gradient norm
(RGN) belongs to the architecture, so it is measured once, shipped, or learnt while training.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from trady.channels import ChannelTable, Layer
from trady.errors import RankingError

Metric = Literal["rgn", "norm"]
Source = Literal["measured", "online", "prior", "given"]
Floats = npt.NDArray[np.float64]

VERSION = 1


def layer_rgn(squared_norms: npt.ArrayLike, layer: Layer) -> float:
    """Layer RGN: Σ_c ‖∂L/∂W[:, c]‖₂² / Σ_c (C^W_c + C^A_c) (arXiv 2510.19675).

    Args:
        squared_norms: ‖∂L/∂W[:, c]‖₂² of every input channel, ``[layer.channels]``.
        layer: Gives the cost of its channels.

    Raises:
        RankingError: When there is not one norm for each channel.
    """
    return layer_score(squared_norms, layer, "rgn")


def channel_rgn(squared_norms: npt.ArrayLike, layer: Layer) -> Floats:
    """RGN_c of every input channel: ‖∂L/∂W[:, c]‖₂ / (C^W_c + C^A_c) (arXiv 2510.19675).

    Args and errors are those of :func:`layer_rgn`; the result is ``[layer.channels]``.
    """
    return channel_scores(squared_norms, layer, "rgn")


def layer_score(squared_norms: npt.ArrayLike, layer: Layer, metric: Metric) -> float:
    """Σ_c ‖∂L/∂W[:, c]‖₂² for ``norm``; divided by the cost of all channels for ``rgn``."""
    total = float(_norms_of(squared_norms, layer).sum())
    return total / (layer.channels * layer.elements) if metric == "rgn" else total


def channel_scores(squared_norms: npt.ArrayLike, layer: Layer, metric: Metric) -> Floats:
    """‖∂L/∂W[:, c]‖₂ of each channel for ``norm``; divided by its cost for ``rgn``."""
    norms = np.sqrt(_norms_of(squared_norms, layer))
    return norms / layer.elements if metric == "rgn" else norms


def top_layers(scores: Mapping[str, float], share: float = 0.97) -> tuple[str, ...]:
    """The fewest layers, highest score first, whose cumulated score reaches the share.

    Equal scores keep their order in ``scores``. When all scores are zero no layer is better
    than another, and all are returned.

    Args:
        scores: Score of each layer, finite and not negative.
        share: Share of the sum of scores, above 0 and at most 1; the paper takes 0.97.

    Raises:
        RankingError: When the share is out of range.
    """
    if not 0 < share <= 1:
        raise RankingError(f"share {share} is not above 0 and at most 1; the paper takes 0.97")
    order = tuple(sorted(scores, key=lambda name: -scores[name]))
    # Exact sums of what the user typed: in floating point, 7 of 100 equal layers are not 0.07 of them.
    missing = Fraction(repr(float(share))) * sum(map(Fraction, scores.values()))
    if missing == 0:
        return order
    for count, name in enumerate(order, start=1):
        missing -= Fraction(scores[name])
        if missing <= 0:
            return order[:count]
    raise AssertionError("unreachable: a share of at most 1 is reached by all layers")


def spearman(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Spearman's rank correlation, -1 to 1, with mean ranks for ties.

    Where it is undefined because one side has a single rank, it is 1 if both have and 0 if not.

    Args:
        left: Values, ``[n]``.
        right: Values of the same things, ``[n]``.
    """
    a, b = _ranks(np.asarray(left, dtype=np.float64)), _ranks(np.asarray(right, dtype=np.float64))
    if np.array_equal(a, b):
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale else 0.0


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
        source: ``measured`` on the user's task, ``online`` while training, ``prior`` shipped with
            trady, ``given`` by the user.
        structure: :func:`structure_digest` of the model it was taken from; may be empty.
        channels: Layer name to the score of each input channel (see :func:`channel_rgn`); may be
            empty or lack layers.
        batches: Number of batches that the gradients came from.

    Raises:
        RankingError: When a value is not as above.
    """

    scores: Mapping[str, float]
    metric: Metric = "rgn"
    source: Source = "given"
    structure: str = ""
    channels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    batches: int = 0

    def __post_init__(self) -> None:
        for what, value, possible in (
            ("metric", self.metric, get_args(Metric)),
            ("source", self.source, get_args(Source)),
        ):
            if value not in possible:
                raise RankingError(f"{what} {value!r} does not exist; there are {', '.join(possible)}")
        if type(self.structure) is not str:
            raise RankingError(f"structure is {self.structure!r}; it is a text")
        if type(self.batches) is not int or self.batches < 0:
            raise RankingError(f"batches is {self.batches!r}; it is a number from 0")
        strangers = set(self.channels) - set(self.scores)
        if strangers:
            raise RankingError(f"channel scores of layers without a score: {_listed(strangers)}")
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

    def top(self, share: float = 0.97) -> tuple[str, ...]:
        """The top-K layers, in falling order: see :func:`top_layers`."""
        return top_layers(self.scores, share)

    def spearman(self, other: LayerRanking) -> float:
        """Rank correlation with another ranking of the same layers: see :func:`spearman`.

        Raises:
            RankingError: When the layers differ.
        """
        _same_layers(other.scores, self.scores, "the other ranking")
        return spearman(list(self.scores.values()), [other.scores[name] for name in self.scores])

    def check(self, table: ChannelTable) -> None:
        """Make sure that this ranks the layers of a table: all of them, and no others.

        Raises:
            RankingError: When it does not; the message says which layers are too many or missing,
                or which layer has another number of channels.
        """
        _same_layers(self.scores, table.names, "the ranking")
        for name, values in self.channels.items():
            if len(values) != table[name].channels:
                raise RankingError(
                    f"the ranking has {len(values)} channels of layer {name!r}, the model "
                    f"{table[name].channels}; measure it on this model with trady.rank"
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
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` reads back to an equal ranking."""
        return {
            "format": "trady-ranking",
            "version": VERSION,
            "metric": self.metric,
            "source": self.source,
            "structure": self.structure,
            "batches": self.batches,
            "scores": dict(self.scores),
            "channels": {name: list(values) for name, values in self.channels.items()},
        }

    @classmethod
    def from_json(cls, data: object) -> LayerRanking:
        """Read what :meth:`to_json` wrote.

        Raises:
            RankingError: When it is something else, of another version, or damaged.
        """
        checked = _versioned(data, "trady-ranking")
        try:
            return cls(
                scores=checked["scores"],
                metric=checked["metric"],
                source=checked["source"],
                structure=checked["structure"],
                channels={name: tuple(values) for name, values in checked["channels"].items()},
                batches=checked["batches"],
            )
        except KeyError as error:
            raise RankingError(f"the ranking lacks {error}") from error
        except (TypeError, AttributeError) as error:
            raise RankingError(f"the ranking is damaged ({error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file of that name is replaced as a whole or not at all.

        Raises:
            RankingError: When the file cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            try:
                partial.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False), encoding="utf-8")
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise RankingError(f"cannot write the ranking to {target}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerRanking:
        """Read what :meth:`save` wrote.

        Raises:
            RankingError: When the file cannot be read, is damaged, or is of another version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RankingError(f"cannot read the ranking {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise RankingError(
                f"{path} is no ranking or is cut short ({error}); measure it again with trady.rank"
            ) from error
        try:
            return cls.from_json(data)
        except RankingError as error:
            raise RankingError(f"{path}: {error}") from error


class OnlineRanking:
    """Learns the ranking from the gradients of the channels that happen to train.

    Channels are drawn uniformly in a layer, so the mean of ‖∂L/∂W[:, c]‖₂² over the drawn ones is
    an unbiased estimate of the layer's mean, however many they were. With it,

        layer RGN ≈ (Σ_observations mean_c ‖g_c‖₂² / observations) · channels / (channels · (C^W + C^A))

    and a layer that is drawn more often has a steadier estimate, not a larger one.

    Args:
        table: The updatable layers.
        drawable: Layers that the budget lets be drawn at all; all when left out. The others are
            not waited for.
        metric: ``rgn`` or ``norm``.
        min_observations: Observations that every drawable layer needs before the ranking settles.
        share: Share of the score that makes the pool, see :func:`top_layers`.
        agreement: Spearman correlation of the scores now and ``window`` observations ago
            from which on they count as the same.
        window: Number of observations between the two; with several steps between redraws, count
            the steps.

    Raises:
        RankingError: When an option is out of range or ``drawable`` names layers the table lacks.
    """

    def __init__(
        self,
        table: ChannelTable,
        *,
        drawable: Collection[str] | None = None,
        metric: Metric = "rgn",
        min_observations: int = 4,
        share: float = 0.97,
        agreement: float = 0.98,
        window: int = 8,
    ) -> None:
        if metric not in get_args(Metric):
            raise RankingError(f"metric {metric!r} does not exist; there are {', '.join(get_args(Metric))}")
        if min_observations < 1 or window < 1 or not 0 < share <= 1 or not -1 <= agreement <= 1:
            raise RankingError(
                f"min_observations {min_observations}, window {window}, share {share}, agreement "
                f"{agreement}: the first two start at 1, share is above 0 and at most 1, agreement "
                "is -1 to 1"
            )
        strangers = set(drawable or ()) - set(table.names)
        if strangers:
            raise RankingError(f"drawable layers that the model lacks: {_listed(strangers)}")
        self._table = table
        self._position = {name: position for position, name in enumerate(table.names)}
        names = table.names if drawable is None else set(drawable)
        self._drawable = np.array([name in names for name in table.names], dtype=np.bool_)
        self._metric: Metric = metric
        self._min_observations = min_observations
        self._share = share
        self._agreement = agreement
        self._weights = np.array(
            [1 / layer.elements if metric == "rgn" else layer.channels for layer in table], dtype=np.float64
        )
        self._sums: Floats = np.zeros(len(table))
        self._counts = np.zeros(len(table), dtype=np.int64)
        self._history: deque[Floats] = deque(maxlen=window + 1)
        self._batches = 0
        self._ignored = 0

    @property
    def batches(self) -> int:
        """Observations so far, those without a usable norm included."""
        return self._batches

    @property
    def ignored(self) -> int:
        """Norms so far that were not finite, and left out."""
        return self._ignored

    @property
    def observations(self) -> dict[str, int]:
        """How often each layer was observed, in order of execution."""
        return dict(zip(self._table.names, self._counts.tolist(), strict=True))

    def observe(self, squared_norms: Mapping[str, npt.ArrayLike]) -> None:
        """Take in the gradients of one batch. A batch of zeros counts like any other.

        Args:
            squared_norms: Layer name to ‖∂L/∂W[:, c]‖₂² of its drawn channels, ``[drawn]``, in any
                order. Layers without a drawn channel may be absent or empty. Norms that are not
                finite are left out and counted in :attr:`ignored`.

        Raises:
            RankingError: For a layer that the model lacks, more norms than the layer has channels,
                or a negative norm; nothing is taken in then.
        """
        read = {name: self._read(name, norms) for name, norms in squared_norms.items()}
        for name, norms in read.items():
            finite = norms[np.isfinite(norms)]
            self._ignored += norms.size - finite.size
            if not finite.size:
                continue
            position = self._position[name]
            with np.errstate(over="ignore"):
                total = self._sums[position] + finite.mean()
            if not np.isfinite(total):
                self._ignored += finite.size
                continue
            self._sums[position] = total
            self._counts[position] += 1
        self._batches += 1
        self._history.append(self._scores())

    def ranking(self) -> LayerRanking:
        """The ranking as it stands.

        A layer that was never observed has the mean score of those that were: unknown is neither
        good nor bad, and such a layer stays in the pool unless a few layers carry nearly all of
        the gradient.
        """
        return LayerRanking(
            scores=dict(zip(self._table.names, self._scores().tolist(), strict=True)),
            metric=self._metric,
            source="online",
            structure=structure_digest(self._table),
            batches=self._batches,
        )

    @property
    def settled(self) -> bool:
        """Whether more observations would change little.

        Every drawable layer was observed often enough, and the drawable layers' top-K set and
        their order (Spearman) are as they were ``window`` observations ago.
        """
        if len(self._history) <= self._window:
            return False
        if (self._counts[self._drawable] < self._min_observations).any():
            return False
        before, now = (scores[self._drawable] for scores in (self._history[0], self._history[-1]))
        if spearman(before, now) < self._agreement:
            return False
        return self._pool(before) == self._pool(now)

    def to_json(self) -> dict[str, Any]:
        """Options and state, exactly: floats survive JSON."""
        return {
            "format": "trady-online-ranking",
            "version": VERSION,
            "layers": list(self._table.names),
            "drawable": [self._table.names[position] for position in np.flatnonzero(self._drawable)],
            "metric": self._metric,
            "min_observations": self._min_observations,
            "share": self._share,
            "agreement": self._agreement,
            "window": self._window,
            "sums": self._sums.tolist(),
            "counts": self._counts.tolist(),
            "history": [scores.tolist() for scores in self._history],
            "batches": self._batches,
            "ignored": self._ignored,
        }

    @classmethod
    def from_json(cls, data: object, table: ChannelTable) -> OnlineRanking:
        """Go on from what :meth:`to_json` wrote.

        Args:
            data: Its result.
            table: The updatable layers of the same model.

        Raises:
            RankingError: When it is something else, of another version, model, or damaged.
        """
        checked = _versioned(data, "trady-online-ranking")
        try:
            if checked["layers"] != list(table.names):
                _same_layers(checked["layers"], table.names, "the online ranking")
                raise RankingError("the online ranking has the model's layers in another order")
            ranking = cls(
                table,
                drawable=checked["drawable"],
                metric=checked["metric"],
                min_observations=checked["min_observations"],
                share=checked["share"],
                agreement=checked["agreement"],
                window=checked["window"],
            )
            ranking._sums = _state(checked["sums"], len(table))
            ranking._counts = _state(checked["counts"], len(table)).astype(np.int64)
            ranking._history.extend(_state(scores, len(table)) for scores in checked["history"])
            ranking._batches = int(checked["batches"])
            ranking._ignored = int(checked["ignored"])
        except RankingError:
            raise
        except KeyError as error:
            raise RankingError(f"the online ranking lacks {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RankingError(f"the online ranking is damaged ({error})") from error
        return ranking

    @property
    def _window(self) -> int:
        return (self._history.maxlen or 1) - 1

    def _read(self, name: str, norms: npt.ArrayLike) -> Floats:
        layer = self._table.by_name.get(name)
        if layer is None:
            raise RankingError(f"observed layer {name!r}, which the model lacks")
        values = np.asarray(norms, dtype=np.float64)
        if values.ndim != 1 or values.size > layer.channels:
            raise RankingError(
                f"observed norms of shape {values.shape} in layer {name!r}; give one for each drawn "
                f"channel, at most {layer.channels}"
            )
        if (values < 0).any():
            raise RankingError(f"observed a negative squared norm in layer {name!r}")
        return values

    def _scores(self) -> Floats:
        observed = self._counts > 0
        if not observed.any():
            return np.zeros(len(self._counts))
        scores = self._sums / np.maximum(self._counts, 1) * self._weights
        scores[~observed] = scores[observed].mean()
        return scores

    def _pool(self, scores: Floats) -> frozenset[str]:
        named = {str(position): score for position, score in enumerate(scores.tolist())}
        return frozenset(top_layers(named, self._share))


def _norms_of(squared_norms: npt.ArrayLike, layer: Layer) -> Floats:
    values = np.asarray(squared_norms, dtype=np.float64)
    if values.shape != (layer.channels,):
        raise RankingError(
            f"squared norms of shape {values.shape} for layer {layer.name!r}; it has {layer.channels} channels"
        )
    return values


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, the mean of their places for equal values."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = np.cumsum(count) - (count - 1) / 2
    return ranks[place]


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


def _state(values: object, size: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all() or (array < 0).any():
        raise RankingError(f"the online ranking is damaged: not {size} finite numbers, one a layer")
    return array


def _same_layers(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    given, expected = set(given), set(expected)
    problems = []
    if given - expected:
        problems.append(f"names layers that do not exist here: {_listed(given - expected)}")
    if expected - given:
        problems.append(f"misses layers: {_listed(expected - given)}")
    if problems:
        raise RankingError(f"{what} {' and '.join(problems)}; is it of another model?")


def _listed(names: Collection[str], most: int = 8) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _versioned(data: object, expected: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or data.get("format") != expected:
        raise RankingError(f'no ranking: "format" is not "{expected}"')
    if data.get("version") != VERSION:
        raise RankingError(
            f"version {data.get('version')!r} of the format; this trady reads version {VERSION}: "
            "update trady, or measure the ranking again with trady.rank"
        )
    return data
