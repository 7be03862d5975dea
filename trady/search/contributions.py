"""Contribution analysis of MCUNetV3 (Lin et al. 2022, arXiv 2206.15472): what one layer, trained alone, gains.

    gain[i, r] = accuracy(head and the r largest-norm share of layer i's input channels trained) - accuracy(head alone)

each after the same short fine-tuning, starting from the pretrained weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from trady.channels.table import ChannelTable
from trady.errors import BudgetError, CheckpointError, PolicyError, TrainingError
from trady.policies.schemes import Scheme, scheme_layers
from trady.policies.sparse_update import SparseUpdate
from trady.records.files import write_json
from trady.records.versioned import Format
from trady.search.evolution import Evolution
from trady.training.checkpoint import fingerprint
from trady.training.run import finetune

#: Called with (what was trained, its accuracy or ``None`` before, runs done, runs in all).
Told = Callable[[str, float | None, int, int], None]

HEAD_ALONE = "head"

_FORMAT = Format(None, "analysis of trady search", CheckpointError, "remove it, and search again")


@dataclass(frozen=True)
class Analysis:
    """What is tried, and for how long.

    Attributes:
        ratios: Shares of a layer's channels that are tried, each above 0 and at most 1.
        last: Try this many layers, counted from the output; ``None`` tries all.
        epochs: Passes over the training data for each.
        batch_size: Examples a step.
        lr: Learning rate at the end of the warm-up.
        seed: Of everything random.
    """

    ratios: tuple[float, ...] = (0.25, 1.0)
    last: int | None = None
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise PolicyError(f"ratios {self.ratios}; give shares of a layer's channels above 0 and at most 1")
        if self.last is not None and self.last < 1:
            raise PolicyError(f"last is {self.last}; try at least one layer")


@dataclass(frozen=True)
class Contributions:
    """Accuracies measured so far.

    Attributes:
        accuracies: By what was trained: ``head``, or ``<layer index>@<ratio>``.
        settings: What they were measured with.
    """

    accuracies: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def gain(self, place: int, ratio: float) -> float:
        """Accuracy of a layer at a ratio over that of the head alone; 0 where it was not tried."""
        return self.accuracies.get(_key(place, ratio), self.accuracies[HEAD_ALONE]) - self.accuracies[HEAD_ALONE]


def analyse(
    model: nn.Module,
    train: Dataset[Any],
    evaluation: Dataset[Any],
    table: ChannelTable,
    budget: int,
    analysis: Analysis,
    *,
    file: Path | None = None,
    told: Told | None = None,
) -> Contributions:
    """Train every candidate by itself; what is in ``file`` already is not trained again.

    Args:
        model: Pretrained, with a head for the data; left as it is.
        train: Examples to train on.
        evaluation: Examples to measure accuracy on: not those that the scheme will be judged by.
        table: Its layers.
        budget: In elements; a candidate that does not fit by itself is left out.
        analysis: What is tried.
        file: Where accuracies are kept after each run; ``None`` keeps nothing.
        told: Told before and after each run.

    Raises:
        CheckpointError: ``file`` is damaged, or of another model or other settings.

    """
    settings = {**asdict(analysis), "ratios": list(analysis.ratios), "model": fingerprint(model)}
    settings.pop("last")  # more layers may be tried later
    found = dict(_read(file, settings).accuracies)
    tried: list[tuple[int, float] | None] = [None, *candidates(table, budget, analysis)]
    for number, candidate in enumerate(tried):
        key = HEAD_ALONE if candidate is None else _key(*candidate)
        if key in found:
            continue
        if told is not None:
            told(key, None, number, len(tried))
        found[key] = _accuracy(model, train, evaluation, table, candidate, analysis)
        if file is not None:
            write_json(file, {"settings": settings, "accuracies": found})
        if told is not None:
            told(key, found[key], number + 1, len(tried))
    return Contributions(found, settings)


def candidates(table: ChannelTable, budget: int, analysis: Analysis) -> list[tuple[int, float]]:
    """Layers and ratios to try, from the output to the input: (index, ratio), each within the budget."""
    places = range(len(scheme_layers(table)))[::-1][: analysis.last]
    return [(i, r) for i in places for r in analysis.ratios if Scheme((i,), (r,)).elements(table) <= budget]


def find_scheme(
    table: ChannelTable, budget: int, contributions: Contributions, analysis: Analysis, evolution: Evolution
) -> Scheme:
    """Combine layers into the scheme with the largest summed contribution within the budget.

    Raises:
        BudgetError: Nothing fits in the budget.
        TrainingError: Nothing that fits gains over the head alone.

    """
    tried = candidates(table, budget, analysis)
    if not tried:
        minimum = min(Scheme((i,), (min(analysis.ratios),)).elements(table) for i in range(len(scheme_layers(table))))
        raise BudgetError(f"no layer fits in {budget} elements at ratios {analysis.ratios}; give at least {minimum}")
    places = sorted({place for place, _ in tried})
    gains = np.zeros((len(places), 1 + len(analysis.ratios)))
    costs = np.zeros(gains.shape, dtype=np.int64)
    for place, ratio in tried:
        row, choice = places.index(place), 1 + analysis.ratios.index(ratio)
        gains[row, choice] = contributions.gain(place, ratio)
        costs[row, choice] = Scheme((place,), (ratio,)).elements(table)
    if not (gains > 0).any():
        raise TrainingError(
            "no layer gains anything over the head alone; analyse longer (--epochs), on more images (--limit) or at "
            "another rate (--lr)"
        )
    chosen = evolution.best(gains, costs, budget)
    kept = [(place, analysis.ratios[c - 1]) for place, c in zip(places, chosen.tolist(), strict=True) if c]
    return Scheme(tuple(p for p, _ in kept), tuple(r for _, r in kept), len(scheme_layers(table)))


def _accuracy(
    model: nn.Module,
    train: Dataset[Any],
    evaluation: Dataset[Any],
    table: ChannelTable,
    candidate: tuple[int, float] | None,
    analysis: Analysis,
) -> float:
    scheme = None if candidate is None else Scheme((candidate[0],), (candidate[1],))
    with torch.random.fork_rng():
        result = finetune(
            copy.deepcopy(model),
            train,
            evaluation,
            budget=None if scheme is None else f"elements:{scheme.elements(table)}",
            policy="head" if scheme is None else SparseUpdate(scheme),
            epochs=analysis.epochs,
            batch_size=analysis.batch_size,
            lr=analysis.lr,
            seed=analysis.seed,
            out=None,
            progress=False,
        )
    return result.accuracy


def _key(place: int, ratio: float) -> str:
    return f"{place}@{ratio:g}"


@dataclass(frozen=True)
class _Record:
    """The entries of the file."""

    accuracies: Mapping[str, float]
    settings: Mapping[str, Any]


def _from_json(data: Any) -> Contributions:
    record = _FORMAT.read(_Record, data)
    return Contributions(record.accuracies, record.settings)


def _read(file: Path | None, settings: Mapping[str, Any]) -> Contributions:
    if file is None or not file.exists():
        return Contributions({}, settings)
    found = _FORMAT.load(file, _from_json)
    changed = [
        f"{k} was {found.settings.get(k)!r}, is now {v!r}" for k, v in settings.items() if found.settings.get(k) != v
    ]
    if changed:
        raise CheckpointError(
            f"{file} was measured with other settings: {'; '.join(changed)}; go on with the same ones, or remove it"
        )
    return found
