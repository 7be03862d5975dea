"""Where nothing would train, preparing says so: PyTorch would say it at the first ``backward()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trady
from benchmarks.habits.networks import X, Y, loss_of, perceptron, sgd
from trady.channels.selection import Selection
from trady.errors import BudgetError, ModelError, PolicyError, StateError
from trady.planning.budget import InfeasibleBudgetError, smallest
from trady.policies import Draw


def observe(tuner: trady.Tuner) -> None:
    tuner.observe([(X, Y)], F.cross_entropy)


def least(policy: str) -> int:
    with pytest.raises(InfeasibleBudgetError) as refused:
        trady.plan(perceptron(), X, budget="1 B", policy=policy, head=[])
    return refused.value.least_amount


@pytest.mark.parametrize("policy", ["medyate", "dynamic-random", "trady"])
def test_a_budget_in_which_no_channel_trains_is_refused_where_there_is_no_head(policy: str) -> None:
    """What the message says to type trains something."""
    budget = f"{least(policy)} B"
    options: dict[str, Any] = {"policy": policy, "head": [], "ranking": "structural"}
    try:
        trady.plan(perceptron(), X, budget=budget, **options)
    except InfeasibleBudgetError as error:
        budget = str(error).split('type budget="')[1].split('"')[0]
    model = perceptron()
    tuner = trady.prepare(model, X, budget=budget, **options)
    observe(tuner)
    assert tuner.selection.count
    optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(model).backward()
    optimizer.step()
    tuner.finish()


MEASURES = ["medyate", "fisher", "velocity"]


@pytest.mark.parametrize("policy", MEASURES)
def test_a_policy_that_has_not_measured_says_so_before_a_pass_that_nothing_would_train_in(policy: str) -> None:
    model = perceptron()
    tuner = trady.prepare(model, X, budget="elements:2000", policy=policy, head=[])
    with pytest.raises(StateError, match=f"cannot train: policy '{policy}' draws from .*call tuner.observe"):
        loss_of(model).backward()
    with torch.no_grad():
        model(X)
    model.eval()(X)
    model.train()
    observe(tuner)
    optimizer = tuner.attach(sgd(model.parameters()))
    loss_of(model).backward()
    optimizer.step()
    tuner.finish()


class Nothing:
    """A policy that never draws."""

    name, uses_ranking = "nothing-for-a-test", False

    def select(self, draw: Draw) -> Selection:
        return Selection()


def test_a_policy_that_draws_nothing_is_refused_where_there_is_no_head() -> None:
    model = perceptron()
    with pytest.raises(
        PolicyError, match=r"'nothing-for-a-test' draws no channel, whatever the budget is.*head=\.\.\."
    ):
        trady.prepare(model, X, budget="elements:1000", policy=Nothing(), head=[])
    tuner = trady.prepare(model, X, budget="elements:1000", policy=Nothing())  # left as it was; its head trains
    loss_of(model).backward()
    tuner.finish()


@pytest.mark.parametrize("head", [[], "auto"])
def test_a_model_that_is_frozen_as_a_whole_is_refused(head: list[str] | str) -> None:
    frozen = perceptron().requires_grad_(False)
    for model, freeze in ((frozen, None), (perceptron(), "*"), (perceptron(), ["0", "2", "4"])):
        with pytest.raises(ModelError, match=r"every layer of this Sequential is frozen by hand: set requires_grad_"):
            trady.prepare(model, X, budget="elements:1000", head=head, freeze=freeze)


def test_the_head_alone_of_a_model_without_one_is_refused() -> None:
    with pytest.raises(ModelError, match="this model has no head"):
        trady.prepare(perceptron(), X, policy="head", head=[])


def test_an_optimizer_that_leaves_no_room_for_a_channel_is_refused_and_the_tuner_is_as_before() -> None:
    model = perceptron()
    tuner = trady.prepare(model, X, budget=f"{least('static-random')} B", policy="static-random", head=[])
    before = tuner.selection
    try:
        tuner.attach(torch.optim.AdamW(model.parameters()))
    except BudgetError:
        assert tuner.selection == before
    else:
        assert tuner.selection.count
    assert isinstance(tuner.finish(), nn.Module)


def test_the_smallest_amount_is_found_and_none_where_there_is_none() -> None:
    assert smallest(lambda amount: amount >= 777, 1) == 777
    found = smallest(lambda amount: amount >= 10**9 + 7, 1)
    assert found is not None
    assert 10**9 + 7 <= found <= (10**9 + 7) * 1.001
    assert smallest(lambda amount: False, 1) is None
