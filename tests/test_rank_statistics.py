"""``trady.rank`` with batch normalisations frozen, and with the statistics of the batch."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Residual, freeze_norms, gradient_of, normal, seeded
from trady.errors import RankingError
from trady.ranking.scores import channel_rgn, layer_rgn

Norm = Literal["frozen", "batch"]


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(normal(6, 3, 9, 9, seed=seed).double(), torch.arange(6).remainder(3)) for seed in range(3)]


def network() -> nn.Module:
    model = seeded(Residual).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # far from the batch's own, so that the two cannot be confused
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.add_(0.3)
            module.running_var.mul_(2.5)
    return model.train()


def squares_of_dense_gradients(norm: Norm, table: trady.ChannelTable) -> dict[str, np.ndarray]:
    dense = copy.deepcopy(network()).requires_grad_(True)
    if norm == "frozen":
        freeze_norms(dense)
    squares = {layer.name: np.zeros(layer.channels) for layer in table}
    for x, y in batches():
        dense.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        for layer in table:
            gradient = gradient_of(dense.get_parameter(layer.parameter))
            others = [axis for axis in range(gradient.dim()) if axis != 1]
            squares[layer.name] += gradient.square().sum(others).numpy() / 3
    return squares


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_every_score_is_that_of_the_dense_model_in_the_same_mode(norm: Norm) -> None:
    model = network()
    table = trady.plan(model, batches()[0][0], budget="elements:500").table
    ranking = trady.rank(model, batches(), F.cross_entropy, norm=norm)
    squares = squares_of_dense_gradients(norm, table)
    assert ranking.norm == norm
    for layer in table:
        assert ranking.scores[layer.name] == pytest.approx(layer_rgn(squares[layer.name], layer), rel=1e-9)
        assert ranking.channels[layer.name] == pytest.approx(channel_rgn(squares[layer.name], layer), rel=1e-9)


def test_the_two_are_not_the_same() -> None:
    found = [trady.rank(network(), batches(), F.cross_entropy, norm=norm).scores for norm in ("frozen", "batch")]
    assert all(found[0][name] != pytest.approx(found[1][name], rel=1e-2) for name in found[0])


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_sweeps_within_a_budget_find_the_same_and_change_nothing(norm: Norm) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    at_once = trady.rank(model, batches(), F.cross_entropy, norm=norm)
    in_sweeps = trady.rank(model, batches(), F.cross_entropy, norm=norm, budget="elements:900")
    assert in_sweeps.scores == pytest.approx(at_once.scores, rel=1e-9)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_statistics_are_back_after_an_error() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        trady.rank(model, batches(), broken, norm="batch")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_without_batch_normalisation_was_measured_with_neither() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3)).double()
    assert trady.rank(model, batches(), F.cross_entropy).norm == ""


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(RankingError, match=r"norm='running' is not known; give 'frozen' or 'batch'"):
        trady.rank(network(), batches(), F.cross_entropy, norm="running")  # type: ignore[arg-type]
