"""The estimators recover what synthetic samples were drawn with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trady.study.estimate import bootstrap_mean
from trady.study.power_laws import fit_power_law
from trady.study.tails import hill, stable_index, top_share

COUNT = 100_000


def stable(alpha: float, seed: int, count: int = COUNT) -> np.ndarray:
    """Symmetric alpha-stable samples (Chambers, Mallows and Stuck 1976)."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-math.pi / 2, math.pi / 2, count)
    waiting = rng.exponential(size=count)
    bend = (np.cos((1 - alpha) * angle) / waiting) ** ((1 - alpha) / alpha)
    return np.sin(alpha * angle) / np.cos(angle) ** (1 / alpha) * bend


def test_the_samples_of_these_tests_are_those_of_scipy() -> None:
    from scipy import stats

    ours, theirs = stable(1.5, 0), stats.levy_stable.rvs(1.5, 0, size=COUNT, random_state=1)
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_the_stable_index_is_recovered_within_five_hundredths(alpha: float) -> None:
    found = [stable_index(stable(alpha, seed), seed=seed) for seed in range(8)]
    assert all(estimate is not None and abs(estimate.value - alpha) < 0.05 for estimate in found), found


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("count", [1000, 20_000])
def test_the_interval_of_the_stable_index_holds_the_truth_about_as_often_as_it_says(alpha: float, count: int) -> None:
    found = [stable_index(stable(alpha, seed, count), seed=seed) for seed in range(100)]
    held = sum(estimate is not None and estimate.low <= alpha <= estimate.high for estimate in found)
    assert held >= 85


def test_scale_and_zeros_do_not_move_the_stable_index() -> None:
    samples = stable(1.5, 3)
    plain, scaled = stable_index(samples), stable_index(np.concatenate([1e-9 * samples, np.zeros(COUNT)]))
    assert plain is not None
    assert scaled is not None
    assert scaled.value == pytest.approx(plain.value, rel=1e-9)


def test_too_few_samples_have_no_index() -> None:
    assert stable_index(np.ones(100)) is None
    assert stable_index(np.zeros(COUNT)) is None
    assert hill(np.ones(100)) is None
    assert fit_power_law(np.ones(100)) is None


@pytest.mark.parametrize("alpha", [1.2, 2.0, 3.0])
def test_hill_recovers_the_exponent_of_a_power_law(alpha: float) -> None:
    samples = np.random.default_rng(1).pareto(alpha, COUNT) + 1
    estimate = hill(samples)
    assert estimate is not None
    assert abs(estimate.value - alpha) < 0.05 * alpha
    assert estimate.low < alpha < estimate.high


def test_hill_finds_no_heavy_tail_in_gaussian_samples() -> None:
    estimate = hill(np.random.default_rng(0).normal(size=COUNT))
    assert estimate is not None
    assert estimate.low > 4


@pytest.mark.parametrize("alpha", [1.5, 6.0])
def test_true_power_laws_have_their_exponent_and_lose_to_the_log_normal_no_more_often_than_by_chance(
    alpha: float,
) -> None:
    fits = [fit_power_law(np.random.default_rng(seed).pareto(alpha, 20_000) + 1) for seed in range(30)]
    assert all(fit is not None and fit.exponent == pytest.approx(1 + alpha, rel=0.1) for fit in fits)
    assert sum(fit is not None and fit.against_lognormal.verdict < 0 for fit in fits) <= 4


def test_power_laws_are_told_from_exponential_tails_both_ways() -> None:
    rng = np.random.default_rng(2)
    heavy, light = fit_power_law(rng.pareto(1.5, COUNT) + 1), fit_power_law(rng.exponential(size=COUNT))
    assert heavy is not None
    assert light is not None
    assert heavy.against_exponential.verdict == 1
    assert light.against_exponential.verdict == -1


def test_a_lognormal_tail_is_no_power_law() -> None:
    fit = fit_power_law(np.random.default_rng(3).lognormal(sigma=0.5, size=COUNT), share=0.5)
    assert fit is not None
    assert fit.against_lognormal.verdict == -1


def test_fits_do_not_depend_on_the_unit() -> None:
    samples = stable(1.5, 5)
    plain, tiny = fit_power_law(samples), fit_power_law(1e-8 * samples)
    assert plain is not None
    assert tiny is not None
    assert tiny.exponent == pytest.approx(plain.exponent)
    assert tiny.threshold == pytest.approx(1e-8 * plain.threshold)


def test_top_share_of_equal_channels_is_their_share_and_one_channel_can_hold_all() -> None:
    assert top_share(np.ones(100), 0.1) == pytest.approx(0.1)
    assert top_share([0.0] * 99 + [5.0], 0.01) == 1.0
    assert top_share([3.0, 1.0], 0.01) == 0.75
    assert top_share(np.ones(30), 0.1) == pytest.approx(0.1)
    assert top_share(np.zeros(10), 0.1) == 0.1


def test_bootstrap_intervals_hold_the_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    estimates = [bootstrap_mean(rng.normal(3, 1, 40), seed=seed) for seed in range(300)]
    held = np.mean([estimate.low <= 3 <= estimate.high for estimate in estimates])
    assert 0.9 <= held <= 0.98


def test_a_decreasing_transform_keeps_the_ends_of_the_interval_in_order() -> None:
    estimate = bootstrap_mean([1.0, 2.0, 3.0], transform=lambda mean: 1 / mean)
    assert estimate.low < estimate.value == 0.5 < estimate.high
