"""Parts of a model that no gradient reaches: not in the table, and no reason to refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.against_dense import armed, dense_gradients, gradients
from tests.models import relative_error

X = torch.randn(4, 3, 8, 8, dtype=torch.float64)


def _encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
    )  # fmt: skip


class Momentum(nn.Module):
    """An online encoder and one that follows it, a predictor, and a queue of what was seen."""

    queue: Tensor
    place: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.online, self.predictor, self.how = _encoder(), nn.Linear(6, 6), how
        self.target = self.online if how.startswith("one encoder") else copy.deepcopy(self.online)
        self.register_buffer("queue", torch.randn(8, 6))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def follow(self) -> None:
        for ours, theirs in zip(self.online.parameters(), self.target.parameters(), strict=False):
            if self.how == "data":
                theirs.data = theirs.data * 0.9 + ours.data * 0.1
            else:
                theirs.mul_(0.9).add_(ours, alpha=0.1)

    def keys(self, x: Tensor) -> Tensor:
        if "detached" in self.how:
            return self.target(x).detach()
        with torch.no_grad():
            return self.target(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.target is not self.online:
            self.follow()
        query, keys = self.predictor(self.online(x)), self.keys(x.flip(-1))
        with torch.no_grad():
            place = int(self.place)
            self.queue[place : place + len(keys)] = keys
            self.place[0] = (place + len(keys)) % len(self.queue)
        return (query @ self.queue.clone().detach().T).logsumexp(1).mean() - F.cosine_similarity(query, keys).mean()


WAYS = ["no_grad", "data", "detached", "one encoder, no_grad", "one encoder, detached"]


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("how", WAYS)
def test_a_momentum_encoder_is_left_alone_and_the_rest_trains_exactly(how: str, recompute: str) -> None:
    torch.manual_seed(0)
    model = Momentum(how).double().train()
    tuner = armed(model, X, recompute=recompute, head=None)
    assert tuner.plan.table.names == ("online.0", "online.3", "online.7", "predictor")
    if model.target is not model.online:
        assert {f.parameter for f in tuner.plan.table.frozen if "no gradient reaches it" in f.reason} == {
            "target.0.weight",
            "target.3.weight",
            "target.7.weight",
        }
    for _ in range(2):
        twin = copy.deepcopy(model)
        expected = dense_gradients(twin, tuner, lambda model: model(X))
        for parameter in tuner.parameters():
            parameter.grad = None
        model(X).backward()
        found = gradients(tuner)
        assert found.keys() == expected.keys()
        assert all(relative_error(found[key], expected[key]) < 1e-10 for key in expected)
    tuner.finish()


@pytest.mark.parametrize("how", WAYS)
def test_its_budget_is_kept(how: str) -> None:
    torch.manual_seed(0)
    model = Momentum(how).double().train()
    tuner = trady.prepare(model, X, budget="peak:90 KiB", ranking="structural")

    def step() -> None:
        model(X).backward()
        for parameter in tuner.parameters():
            parameter.grad = None

    peak = tuner.ledger(step, inference=False).peak_bytes
    assert peak <= 90 * 1024
    assert tuner.plan.predicted_peak_bytes == pytest.approx(peak, rel=0.05)
    tuner.finish()


def test_an_average_that_is_taken_inside_of_the_pass_hides_no_layer() -> None:
    class Centred(nn.Module):
        centre: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = _encoder(), nn.Linear(6, 4)
            self.register_buffer("centre", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.body(x))
            with torch.no_grad():
                self.centre.mul_(0.9).add_(y.mean(0), alpha=0.1)
            return (y - self.centre).square().mean()

    torch.manual_seed(0)
    model = Centred().double()
    tuner = armed(model, X)
    assert tuner.plan.table.names == ("body.0", "body.3", "body.7")
    expected = dense_gradients(copy.deepcopy(model), tuner, lambda model: model(X))
    model(X).backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[key], expected[key]) < 1e-10 for key in expected)
    tuner.finish()


def test_custom_functions_may_have_a_gradient_of_their_own() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Doubled.apply(self.first(x)))

    assert trady.plan(Model(), torch.zeros(2, 8), budget="elements:900", ranking="structural").table.names == ("first",)
