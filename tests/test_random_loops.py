"""Some of the combinations of ``python -m benchmarks.random_loops``: whatever a loop does, its budget is kept."""

from __future__ import annotations

import pytest

from benchmarks.random_loops import LOOPS, MODELS, Combination, draw, run_one


@pytest.mark.parametrize("number", range(6))
def test_a_random_combination_keeps_its_budget(number: int) -> None:
    outcome = run_one(draw(number, seed=1))
    assert outcome.status in ("kept", "refused", "impossible"), outcome
    assert outcome.status == "impossible" or outcome.budget_bytes > 0


def test_what_the_first_step_leaves_behind_is_in_the_peak_of_the_next() -> None:
    """Scales and shifts of frozen normalisations: 176 bytes where the head alone trains, on images that are tiny."""
    combination = Combination(
        0, "conv, batch norm, ReLU6", 16, 12, 0.04, "head", "adafactor", "plain", "off", "auto", True, "exact"
    )
    assert run_one(combination).status == "kept"


def test_a_policy_that_keeps_what_was_trained_refuses_a_larger_batch_rather_than_exceed_its_budget() -> None:
    outcome = run_one(draw(295, seed=0))
    assert (outcome.combination.policy, outcome.combination.loop) == ("velocity", "a larger last batch")
    assert outcome.status == "refused", outcome


@pytest.mark.parametrize("loop", LOOPS)
def test_every_kind_of_loop_keeps_its_budget(loop: str) -> None:
    combination = Combination(
        0, "transformer", 4, 12, 0.05, "dynamic-random", "adamw", loop, "off", "auto", False, "exact"
    )
    outcome = run_one(combination)
    assert outcome.status in ("kept", "refused"), outcome
    if outcome.status == "refused":
        assert loop in ("two calls", "longer batches", "a larger last batch")


def test_a_combination_is_a_function_of_its_number_and_the_seed() -> None:
    assert draw(3, 0) == draw(3, 0) != draw(3, 1)
    assert {draw(number, 0).model for number in range(60)} == set(MODELS)
    assert {draw(number, 0).loop for number in range(60)} == set(LOOPS)
