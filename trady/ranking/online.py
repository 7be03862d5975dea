"""The ranking learnt while training: from the gradients of the channels that are drawn anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from trady.channels.table import ChannelTable
from trady.errors import RankingError
from trady.ranking.ranking import SCORE, LayerRanking, listed, same_layers, structure_digest
from trady.ranking.scores import Floats, Metric, spearman, top_layers
from trady.ranking.structural import structural_ranking
from trady.records.schema import Natural
from trady.records.versioned import Format

#: What was learnt so far, as JSON.
FORMAT = Format(
    "trady-online-ranking", "online ranking", RankingError, "start it again with an empty one", version=2, changed=SCORE
)


@dataclass(frozen=True)
class _Record:
    """What an online ranking is gone on with from: its options, and what it has added up."""

    layers: tuple[str, ...]
    drawable: tuple[str, ...]
    metric: Metric
    min_observations: int
    share: float
    agreement: float
    window: int
    sums: tuple[float, ...]
    counts: tuple[Natural, ...]
    history: tuple[tuple[float, ...], ...]
    batches: Natural
    ignored: Natural


class OnlineRanking:
    """Learns the ranking from the gradients of whichever channels train.

    Channels are drawn uniformly in a layer, so the mean of ‖g_c‖₂ = ‖∂L/∂W[:, c]‖₂ over the drawn ones is an
    unbiased estimate of the layer's mean, however many were drawn. With it, equation 8 of arXiv 2510.19675 is

        layer RGN = Σ_c ‖g_c‖₂ / (C^W_c + C^A_c)
                  ≈ (Σ_observations mean_c ‖g_c‖₂ / observations) · channels / (C^W + C^A)

    and a layer that is drawn more often has a steadier estimate, not a larger one.

    Args:
        table: The updatable layers.
        drawable: Layers with a channel that fits in the budget; all when left out. The ranking does not wait
            for the others.
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
            raise RankingError(f"drawable layers that the model lacks: {listed(strangers)}")
        self._table = table
        self._position = {name: position for position, name in enumerate(table.names)}
        names = table.names if drawable is None else set(drawable)
        self._drawable = np.array([name in names for name in table.names], dtype=np.bool_)
        self._metric: Metric = metric
        self._min_observations = min_observations
        self._share = share
        self._agreement = agreement
        self._weights = np.array(
            [layer.channels / (layer.elements if metric == "rgn" else 1) for layer in table], dtype=np.float64
        )
        self._guess = np.array(list(structural_ranking(table).scores.values()), dtype=np.float64)
        if metric == "norm":
            self._guess *= [layer.elements for layer in table]
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
            self._sums[position] += np.sqrt(finite).mean()
            self._counts[position] += 1
        self._batches += 1
        self._history.append(self._scores())

    def ranking(self) -> LayerRanking:
        """The ranking as it stands.

        A layer that was never observed has a guess from its shapes (:func:`structural_ranking`), on the scale of the
        observed ones.
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
            **FORMAT.header(),
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
        record = FORMAT.read(_Record, data)
        with FORMAT.reading():
            if record.layers != table.names:
                same_layers(record.layers, table.names, "the online ranking")
                raise RankingError("the online ranking has the model's layers in another order")
            ranking = cls(
                table,
                drawable=record.drawable,
                metric=record.metric,
                min_observations=record.min_observations,
                share=record.share,
                agreement=record.agreement,
                window=record.window,
            )
            ranking._sums = _state(record.sums, len(table))
            ranking._counts = _state(record.counts, len(table)).astype(np.int64)
            ranking._history.extend(_state(scores, len(table)) for scores in record.history)
            ranking._batches, ranking._ignored = record.batches, record.ignored
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
        scores[~observed] = self._guess[~observed] * (scores[observed].sum() / self._guess[observed].sum())
        return scores

    def _pool(self, scores: Floats) -> frozenset[str]:
        named = {str(position): score for position, score in enumerate(scores.tolist())}
        return frozenset(top_layers(named, self._share))


def _state(values: object, size: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or (array < 0).any():
        raise RankingError(f"the online ranking is damaged: it needs {size} numbers from 0, one a layer")
    return array
