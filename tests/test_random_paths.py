"""Models that leave layers out at random, or by what they keep: the same table always, exact steps, the budget kept."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.against_dense import EVERYTHING, armed, dense_gradients, gradients
from tests.models import relative_error
from trady.trace.draws import Draws

DEPTH, LEFT_OUT = 4, 0.4


class Block(nn.Module):
    """Norms and activations that are fused and overwrite their input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(F.relu(self.norm(self.first(x)))))


class Smooth(nn.Module):
    """What is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.gelu(self.first(x)))


class Deep(nn.Module):
    def __init__(self, skips: Callable[[Deep, int], bool], block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(3, 8, 1), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.skips, self.of_python, self.of_numpy = skips, random.Random(1), np.random.RandomState(1)
        self.of_torch, self.new_kind = torch.Generator(), np.random.default_rng(1)
        self.drawn: list[bool] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.stem(x)
        for place, block in enumerate(self.blocks):
            if not (self.training and self.skips(self, place)):
                x = block(x)
        return self.head(x.mean(2))


def _before(model: Deep, place: int) -> bool:
    """All numbers are drawn in front of the first layer."""
    if place == 0:
        model.drawn = (torch.rand(DEPTH) < LEFT_OUT).tolist()
    return bool(model.drawn[place])


def _either_way(model: Deep, place: int) -> bool:
    return random.random() < LEFT_OUT if place % 2 else random.random() > 1 - LEFT_OUT


SKIPS: dict[str, Callable[[Deep, int], Any]] = {
    "torch": lambda model, place: torch.rand([]) < LEFT_OUT,
    "torch, one element": lambda model, place: torch.empty(1).uniform_().item() < LEFT_OUT,
    "torch, the other way round": lambda model, place: torch.rand(1) > 1 - LEFT_OUT,
    "bernoulli": lambda model, place: bool(torch.bernoulli(torch.tensor(LEFT_OUT))),
    "python": lambda model, place: random.random() < LEFT_OUT,
    "numpy": lambda model, place: np.random.uniform(0, 1) < LEFT_OUT,  # noqa: NPY002
    "own, of Python": lambda model, place: model.of_python.random() < LEFT_OUT,
    "own, of NumPy": lambda model, place: model.of_numpy.uniform() < LEFT_OUT,
    "own, of PyTorch": lambda model, place: torch.rand((), generator=model.of_torch) < LEFT_OUT,
    "own, of NumPy's new kind": lambda model, place: model.new_kind.random() < LEFT_OUT,
    "drawn before": _before,
    "either way": _either_way,
}

X, Y = torch.randn(6, 3, 10, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _deep(skips: Callable[[Deep, int], Any], block: type[nn.Module] = Block) -> Deep:
    torch.manual_seed(0)
    return Deep(skips, block).double().train()


def _loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("name", SKIPS)
def test_the_table_has_all_layers_under_every_seed(name: str) -> None:
    for seed in range(3):
        model = _deep(SKIPS[name])
        _seed(seed)
        before = torch.get_rng_state(), random.getstate()
        table = trady.plan(model, X, budget=EVERYTHING, policy="full").table
        assert len(table) == 1 + 2 * DEPTH
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]


@pytest.mark.parametrize("block", [Block, Smooth])
@pytest.mark.parametrize("name", SKIPS)
def test_a_step_that_leaves_layers_out_has_the_gradients_of_the_plain_model(name: str, block: type[nn.Module]) -> None:
    model = _deep(SKIPS[name], block)
    tuner = armed(model, X, recompute="all")
    ran = set()
    for seed in range(5):
        twin = copy.deepcopy(model)  # its own generators are where those of the model are
        _seed(seed)
        expected = dense_gradients(twin, tuner, _loss)
        for parameter in tuner.parameters():
            parameter.grad = None
        _seed(seed)
        _loss(model).backward()
        found = gradients(tuner)
        assert found.keys() == expected.keys()
        assert all(relative_error(found[key], expected[key]) < 1e-10 for key in expected)
        ran.add(len(found))
    assert len(ran) > 1  # not all steps were alike
    tuner.finish()


@pytest.mark.parametrize("block", [Block, Smooth])
@pytest.mark.parametrize("name", SKIPS)
def test_a_peak_budget_holds_whatever_is_left_out(name: str, block: type[nn.Module]) -> None:
    model = _deep(SKIPS[name], block)
    least = trady.plan(model, X, budget="peak:1 GiB", ranking="structural", recompute="all").least_peak_bytes
    assert least is not None
    budget = least + 4096
    tuner = trady.prepare(model, X, budget=f"peak:{budget} B", ranking="structural")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=1e-3))

    def step() -> None:
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(4):
        _seed(seed)
        assert tuner.ledger(step, inference=False).peak_bytes <= budget
    tuner.finish()


class Counts(nn.Module):
    """Every other pass takes a branch; the last activation is kept for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.other = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1)
        self.head, self.passes = nn.Linear(8, 3), 0
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = F.relu(self.norm(self.first(x)))
        if self.passes % 2 == 0:
            x = F.relu(x + self.other(x))
        if self.memory is not None:
            x = F.relu(x + self.memory)
        self.memory = x.detach()
        return self.head(x.mean(2))


def test_a_model_that_decides_by_what_it_keeps_trains_exactly() -> None:
    torch.manual_seed(0)
    model = Counts().double().train()
    tuner = armed(model, X)
    assert tuner.plan.table.names == ("first", "other")
    assert (model.passes, model.memory) == (0, None)
    for _ in range(4):
        expected = dense_gradients(copy.deepcopy(model), tuner, _loss)
        for parameter in tuner.parameters():
            parameter.grad = None
        _loss(model).backward()
        found = gradients(tuner)
        assert found.keys() == expected.keys()
        assert all(relative_error(found[key], expected[key]) < 1e-10 for key in expected)
    tuner.finish()


def test_numbers_are_close_to_one_or_zero_as_they_are_said_to_be() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        for draws, low, high in ((Draws(), 0.99, 1.0), (Draws(high=False), 0.0, 0.01)):
            watch = draws.arm([])
            drawn = [random.random(), *torch.rand(40).tolist(), *np.random.rand(5).tolist()]  # noqa: NPY002
            assert all(low <= number <= high for number in drawn)
            assert watch.moved()
            assert watch.words() == 40
        Draws(flipped=frozenset([1])).arm([])
        assert [round(number) for number in torch.rand(3).tolist()] == [1, 0, 1]
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
