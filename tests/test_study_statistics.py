"""Statistics say of made-up records what those were made to have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from trady.channels.table import ChannelTable, Layer
from trady.errors import BudgetError
from trady.ranking.scores import top_layers
from trady.study.folder import Unit
from trady.study.heavy_tails import heavy_tails
from trady.study.importance import discoveries, importance, welch
from trady.study.noise import LayerNoise, layer_noise
from trady.study.online import budgets_of, online
from trady.study.records import Records
from trady.study.retained_gradient import best, kept
from trady.study.settings import StudySettings
from trady.study.stability import stability
from trady.study.statistics import statistics

LAYERS, CHANNELS, STEPS = 8, 16, 40
UNITS = tuple(Unit(task, seed, epoch) for task in ("a", "b") for seed in range(2) for epoch in range(2))


def table() -> ChannelTable:
    """Layers that all cost the same, but for the last, whose channels cost five times as much."""
    layers = []
    for at in range(LAYERS):
        activations = 40 if at == LAYERS - 1 else 1
        layers.append(
            Layer(f"l{at}", f"l{at}.weight", "conv2d", CHANNELS, 9, activations, 9, (9, CHANNELS, 1, 1), (), ())
        )
    return ChannelTable(tuple(layers))


def records(channel_scale: Callable[[Unit], np.ndarray], layer_scale: np.ndarray, spread: float = 0.2) -> Records:
    """Squared norms: layer scale × channel scale × log-normal scatter from step to step."""
    norms = {}
    for number, unit in enumerate(UNITS):
        rng = np.random.default_rng(number)
        scatter = np.exp(spread * rng.normal(size=(LAYERS, STEPS, CHANNELS)))
        values = layer_scale[:, None, None] * channel_scale(unit) * scatter
        norms[unit] = {f"l{at}": values[at].astype(np.float32) for at in range(LAYERS)}
    noise = {unit: [replace(gaussian_noise(), layer=f"l{at}") for at in range(LAYERS)] for unit in UNITS}
    return Records(StudySettings("made up", epochs=2), table(), UNITS, norms, noise, dict.fromkeys(UNITS, 0.5))


@cache
def gaussian_noise() -> LayerNoise:
    return layer_noise("any", np.random.default_rng(0).normal(size=(4, 300)), 0)


def of_the_task(unit: Unit) -> np.ndarray:
    """Other channels matter on the other task."""
    return np.random.default_rng(100 + (unit.dataset == "b")).permutation(np.geomspace(1, 50, CHANNELS))


def of_no_task(unit: Unit) -> np.ndarray:
    return np.geomspace(1, 50, CHANNELS)


FALLING = np.geomspace(1, 1e-4, LAYERS)


@pytest.fixture(scope="module")
def dependent() -> Records:
    return records(of_the_task, FALLING)


@pytest.fixture(scope="module")
def independent() -> Records:
    return records(of_no_task, FALLING)


def test_layers_that_keep_their_order_have_a_correlation_near_one_everywhere(dependent: Records) -> None:
    found = stability(dependent)
    assert [(given.between, given.pairs) for given in found.layers] == [("epochs", 4), ("seeds", 4), ("tasks", 4)]
    assert all(given.least is not None and given.least > 0.95 for given in found.layers)
    assert np.diag(np.array(found.matrix)) == pytest.approx(1)


def test_channels_that_change_places_with_the_task_agree_between_seeds_only(dependent: Records) -> None:
    by = {given.between: given.mean for given in stability(dependent).channels}
    assert by["seeds"] is not None
    assert by["tasks"] is not None
    assert by["seeds"] > 0.9
    assert by["tasks"] < 0.6


def test_pools_are_the_top_layers_and_hold_on_another_task_what_its_gradient_says(dependent: Records) -> None:
    found = stability(dependent)
    rgn = found.layer_rgn["a"]
    assert all(pool.layers == top_layers(rgn) and pool.k == len(pool.layers) for pool in found.pools)
    (there,) = [transfer for transfer in found.transfers if transfer.measured_on == "a"]
    other = dependent.layer_rgn(dependent.of("b"))
    assert there.rgn == pytest.approx(sum(other[name] for name in top_layers(rgn)) / sum(other.values()))
    assert there.overlap == 1
    assert found.curves["a"][-1] == pytest.approx(1)


def test_tests_reject_between_tasks_and_not_between_seeds(dependent: Records) -> None:
    found = importance(dependent)
    tasks = [test for test in found if test.kind == "tasks"]
    seeds = [test for test in found if test.kind == "seeds"]
    assert len(tasks) == len(seeds) == 2
    assert all(test.rejected_shares > 0.8 and test.layers_rejected == 1 for test in tasks)
    assert all(test.rejected_shares < 0.05 and test.layers_rejected == 0 for test in seeds)
    assert all(test.channels == LAYERS * CHANNELS and test.samples == (80, 80) for test in tasks + seeds)


def test_tests_of_shares_do_not_see_a_task_with_larger_gradients_throughout() -> None:
    found = importance(records(lambda unit: of_no_task(unit) * (1 + (unit.dataset == "b")), FALLING))
    tasks = [test for test in found if test.kind == "tasks"]
    assert all(test.rejected > 0.9 for test in tasks)
    assert all(test.rejected_shares < 0.05 for test in tasks)


def test_runs_as_samples_reject_where_the_task_decides_and_not_where_each_run_is_its_own() -> None:
    def of_the_run(unit: Unit) -> np.ndarray:
        return np.random.default_rng([unit.seed, unit.dataset == "b"]).permutation(np.geomspace(1, 50, CHANNELS))

    (by_task,) = [test for test in importance(records(of_the_task, FALLING)) if test.kind == "runs"]
    of_runs = importance(records(of_the_run, FALLING))
    assert by_task.samples == (2, 2)
    assert by_task.rejected_shares > 0.5
    assert all(test.rejected_shares > 0.8 for test in of_runs if test.kind == "seeds")
    assert all(test.rejected_shares < 0.1 for test in of_runs if test.kind == "runs")
    assert all(test.uncorrected_shares < 0.2 for test in of_runs if test.kind == "runs")
    assert by_task.uncorrected_shares > 0.7


def test_false_discoveries_are_held_down_over_all_channels() -> None:
    rng = np.random.default_rng(0)
    p = welch(rng.normal(size=(30, 5000)), rng.normal(size=(30, 5000)))
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert discoveries(p).mean() < 0.001


def test_channels_that_never_vary_differ_only_if_their_values_do() -> None:
    assert welch(np.ones((5, 2)), np.array([[1.0, 2.0]] * 5)).tolist() == [1.0, 0.0]


def test_rgn_keeps_more_gradient_than_the_norm_where_large_channels_are_dear() -> None:
    found = kept(records(of_no_task, np.ones(LAYERS) + 0.2 * (np.arange(LAYERS) == LAYERS - 1)))
    small = [point for point in found if point.share <= 0.05]
    assert small
    assert all(point.rgn >= point.norm for point in small)
    assert any(point.rgn > 1.5 * point.norm for point in small)
    assert all((point.rgn, point.norm) == pytest.approx((1, 1)) for point in found if point.share == 1)


def test_a_budget_is_never_exceeded_and_its_fill_is_counted(dependent: Records) -> None:
    squared = dependent.mean(dependent.of("a"))
    share, count = best(dependent.table, squared, "norm", 10 * 5)
    norms = np.sort(np.concatenate([squared[f"l{at}"] for at in range(LAYERS - 1)]))[::-1]
    assert count == 5
    assert share == pytest.approx(norms[:5].sum() / sum(values.sum() for values in squared.values()))


def test_online_ranking_with_room_for_all_is_the_offline_one_after_the_steps_that_it_saw() -> None:
    still = records(of_no_task, FALLING, spread=0.0)
    whole = sum(layer.channels * layer.elements for layer in still.table)
    found = online(still, [whole])
    assert all(point.spearman == point.spearman_same_steps == 1 for point in found)
    assert all(point.overlap == point.k_offline for point in found)


def test_online_ranking_gets_better_with_draws_and_budget(dependent: Records) -> None:
    found = {(point.elements, point.draws): point.spearman for point in online(dependent, [150, 1000])}
    assert found[150, 80] > found[150, 1]
    assert found[1000, 1] >= found[150, 1]
    assert found[1000, 80] > 0.97


def test_budgets_of_the_simulation_are_in_elements_and_large_enough(dependent: Records) -> None:
    assert budgets_of(dependent, ["elements:500"]) == (500,)
    assert len(budgets_of(dependent, [])) == 3
    with pytest.raises(BudgetError, match=r"type e\.g\. elements:27946"):
        budgets_of(dependent, ["300 MiB"])
    with pytest.raises(BudgetError, match="the minimum is elements:10"):
        budgets_of(dependent, ["elements:9"])


def test_top_shares_and_tails_are_given_for_each_task_and_epoch(dependent: Records) -> None:
    found = heavy_tails(dependent)
    assert len(found.epochs) == 4
    assert len(found.top_shares) == 12
    assert all(top.carried.low <= top.carried.value <= top.carried.high for top in found.top_shares)
    assert all(tails.stable is not None and tails.below_gaussian == 0 for tails in found.epochs)
    # A tenth of the channels of layers whose gradients fall by a factor of 3.7 each.
    assert all(top.carried.value > 0.6 for top in found.top_shares if top.channels == 0.1)


def test_statistics_are_plain_json_that_says_what_it_is(independent: Records) -> None:
    found = statistics(independent, ["elements:500"])
    whole = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert whole["format"] == "trady-study-statistics"
    assert whole["layers"] == LAYERS
    assert whole["channels"] == LAYERS * CHANNELS
    assert whole["settings"]["model"] == "made up"
    assert len(whole["heavy_tails"]["layers"]) == LAYERS * len(UNITS)
    assert len(json.dumps(found.summary())) < len(json.dumps(whole)) / 2


def test_a_study_of_one_run_has_no_pairs_and_still_a_page(independent: Records) -> None:
    from trady.study.figures import FIGURES
    from trady.study.report import as_page

    unit = UNITS[0]
    alone = Records(
        StudySettings("made up", epochs=1), independent.table, (unit,), {unit: independent.norms[unit]},
        {unit: independent.noise[unit]}, {unit: 0.5},
    )  # fmt: skip
    found = statistics(alone)
    assert found.importance == ()
    assert all(given.mean is None for given in found.stability.layers)
    for draw in FIGURES.values():
        draw(found)
    assert "There is one recording only" in as_page(found, dict.fromkeys(FIGURES, "<svg></svg>"))


def test_the_page_has_every_figure_and_number_and_asks_nothing_of_the_network(
    dependent: Records, tmp_path: Path
) -> None:
    from trady.study.figures import FIGURES, draw_all
    from trady.study.report import as_page

    found = statistics(dependent)
    drawn = draw_all(found, tmp_path)
    text = as_page(found, drawn)
    assert text.count("<svg") == len(FIGURES) == 8
    assert not re.search(r'(src|href)="(?!#|data:)|<script|@import', text)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")
    }
