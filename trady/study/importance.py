"""Observation 3: which channels matter depends on the task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from trady.errors import TrainingError
from trady.ranking.scores import Floats
from trady.study.records import Records

#: Allowed share of false rejections among the rejections.
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True)
class LayerTest:
    """Welch's t-tests of the channels of one layer.

    Attributes:
        layer: Its name.
        channels: Number of channels tested: those with a gradient on either side.
        rejected: Share of them whose mean norm differs.
        rejected_shares: Share of them whose mean share of the layer's norm differs.
    """

    layer: str
    channels: int
    rejected: float
    rejected_shares: float


@dataclass(frozen=True)
class TaskTest:
    """Welch's t-tests of equal means between two recordings, one a channel (arXiv 2510.19675, section 3).

    A channel's samples are the recorded steps of a run. Steps of one run share its weights, so two runs differ in more
    than their task; the control, two seeds of one task, shows by how much. Tests with one sample a run account for
    this. With a few seeds none of them can survive the correction, but together they are informative: where only
    chance is at work, 5 % of the channels have an uncorrected p below 0.05. Two quantities are tested: the norm
    ‖∂L/∂W[:, c]‖₂ itself, which also differs where one task has larger gradients throughout, and its share of the
    layer's norm, which does not. P-values are corrected over all channels of the model (Benjamini and Hochberg 1995);
    rejected are those at a false discovery rate of 5 %.

    Attributes:
        kind: ``tasks`` (two data sets, same seed), the control ``seeds`` (same data set, two seeds), or ``runs`` (two
            data sets, every run's mean over its steps one sample).
        left: One side.
        right: The other.
        samples: Steps or runs on each side.
        channels: Number of channels tested.
        rejected: Share of them whose mean norm differs.
        rejected_shares: Share of them whose mean share of the layer's norm differs.
        uncorrected_shares: Share of channels whose uncorrected p-value, of the shares, is below 0.05.
        layers_rejected: Share of layers in which the means of more than half of the channels differ, by their shares.
        layers: Layer by layer.
    """

    kind: str
    left: str
    right: str
    samples: tuple[int, int]
    channels: int
    rejected: float
    rejected_shares: float
    uncorrected_shares: float
    layers_rejected: float
    layers: tuple[LayerTest, ...]


@dataclass(frozen=True)
class _Side:
    """One side of a test: its name, and the norms ‖∂L/∂W[:, c]‖₂ of a layer's channels, [samples, channels]."""

    name: str
    samples: Callable[[str], Floats]


def importance(records: Records) -> tuple[TaskTest, ...]:
    """Test every pair of data sets, under each seed and over runs, and every pair of seeds on each data set.

    Raises:
        TrainingError: scipy is not installed.
    """
    found: list[TaskTest | None] = []
    for a, b in combinations(records.datasets, 2):
        for seed in records.seeds:
            if (a, seed) in records.runs and (b, seed) in records.runs:
                found.append(_test(records, "tasks", _steps(records, a, seed), _steps(records, b, seed)))
        found.append(_test(records, "runs", _runs(records, a), _runs(records, b)))
    for (a, seed), (b, other) in combinations(records.runs, 2):
        if a == b:
            found.append(_test(records, "seeds", _steps(records, a, seed), _steps(records, b, other)))
    return tuple(test for test in found if test is not None)


def _steps(records: Records, dataset: str, seed: int) -> _Side:
    units = records.of(dataset, seed)
    return _Side(f"{dataset}, seed {seed}", lambda layer: np.sqrt(records.steps(units, layer)))


def _runs(records: Records, dataset: str) -> _Side:
    runs = [records.of(name, seed) for name, seed in records.runs if name == dataset]
    return _Side(dataset, lambda layer: np.stack([np.sqrt(records.steps(units, layer)).mean(0) for units in runs]))


def _test(records: Records, kind: str, left: _Side, right: _Side) -> TaskTest | None:
    raw: list[Floats] = []
    relative: list[Floats] = []
    names: list[str] = []
    samples = (0, 0)
    for layer in records.table:
        a, b = left.samples(layer.name), right.samples(layer.name)
        samples = (len(a), len(b))
        alive = a.any(0) | b.any(0)
        if min(samples) < 2 or not alive.any():
            continue
        names.append(layer.name)
        raw.append(welch(a[:, alive], b[:, alive]))
        relative.append(welch(_shares(a)[:, alive], _shares(b)[:, alive]))
    if not names:
        return None
    ends = np.cumsum([len(values) for values in raw])[:-1]
    by_layer, by_layer_relative = (np.split(discoveries(np.concatenate(values)), ends) for values in (raw, relative))
    layers = tuple(
        LayerTest(layer, len(one), float(one.mean()), float(two.mean()))
        for layer, one, two in zip(names, by_layer, by_layer_relative, strict=True)
    )
    return TaskTest(
        kind=kind,
        left=left.name,
        right=right.name,
        samples=samples,
        channels=sum(map(len, raw)),
        rejected=float(np.concatenate(by_layer).mean()),
        rejected_shares=float(np.concatenate(by_layer_relative).mean()),
        uncorrected_shares=float((np.concatenate(relative) < 0.05).mean()),
        layers_rejected=float(np.mean([layer.rejected_shares > 0.5 for layer in layers])),
        layers=layers,
    )


def welch(left: Floats, right: Floats) -> Floats:
    """Two-sided p-values of Welch's t-test, column by column of [steps, channels]; 1 where neither side varies."""
    stats = _scipy_stats()
    varies = (left.std(0) > 0) | (right.std(0) > 0)
    p = np.ones(left.shape[1])
    if varies.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for channels that hardly vary, whose p-value cannot be better
            p[varies] = stats.ttest_ind(left[:, varies], right[:, varies], equal_var=False).pvalue
    constant = ~varies & (left[0] != right[0])
    p[constant] = 0.0
    return p


def discoveries(p: Floats) -> Floats:
    """1 where equality is rejected at the false discovery rate, 0 elsewhere (Benjamini and Hochberg 1995)."""
    adjusted: Floats = _scipy_stats().false_discovery_control(p)
    return (adjusted < FALSE_DISCOVERIES).astype(np.float64)


def _shares(norms: Floats) -> Floats:
    """Each channel's share of the layer's norm, step by step."""
    total = np.sqrt(np.square(norms).sum(1, keepdims=True))
    return norms / np.where(total > 0, total, 1)


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise TrainingError('t-tests need an extra: pip install "trady[study]"') from None
    return stats
