"""What models are called with, what they share, and losses of several of them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.habits.models import training
from benchmarks.habits.networks import X, Y, loss_of, perceptron, sgd, train, vectors
from benchmarks.habits.row import Rows, Side

ROWS = Rows()


# -- what a model is called with -----------------------------------------------------------------------


@dataclass
class _Graph:
    x: Tensor
    edges: Tensor


class _Named(NamedTuple):
    x: Tensor
    scale: Tensor


class _Of(nn.Module):
    def __init__(self, get: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.get = nn.Linear(12, 16), nn.Linear(16, 3), get

    def forward(self, data: Any) -> Tensor:
        out: Tensor = self.head(F.gelu(self.first(self.get(data))))
        return out


class _OfNames(_Of):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.head(F.gelu(self.first(x))) * scale
        return out


def _scored(given: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(given), Y)


_EDGES, _SCALE = torch.zeros(2, 3, dtype=torch.int64), torch.ones(16, 1, dtype=torch.float64) * 2
_INPUTS: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "a dict": ({"x": X}, lambda data: data["x"]),
    "a UserDict (BatchEncoding)": (UserDict(x=X), lambda data: data["x"]),
    "a dataclass (a graph)": (_Graph(X, _EDGES), lambda data: data.x),
    "a named tuple": (_Named(X, _SCALE), lambda data: data.x),
    "a list of tensors": ([X, X + 1], lambda data: torch.stack(data).mean(0)),
}
for _name, (_given, _get) in _INPUTS.items():
    ROWS.add(f"one argument: {_name}")(training(partial(_Of, _get), (_given,), partial(_scored, _given)))
ROWS.add("arguments by name: model(**batch)")(
    training(
        lambda: _OfNames(lambda data: data),
        {"x": X, "scale": _SCALE},
        lambda model: F.cross_entropy(model(x=X, scale=_SCALE), Y),
    )
)
ROWS.add("output: a dict of scores")(
    training(lambda: _Answers(), loss=lambda model: F.cross_entropy((out := model(X))["scores"], Y) + out["norm"])
)


class _Answers(_Of):
    def __init__(self) -> None:
        super().__init__(lambda data: data)

    def forward(self, data: Any) -> Any:
        out = super().forward(data)
        return {"scores": out, "norm": out.square().mean()}


# -- shared and tied -----------------------------------------------------------------------------------


class _Shared(nn.Module):
    """One layer in several places, one head for two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.gelu(self.again(F.gelu(self.again(F.gelu(self.first(x))))))
        return self.head(x), self.head(x.flip(0))


ROWS.add("a layer in two places, a head of two outputs")(
    training(
        _Shared,
        loss=lambda model: sum(F.cross_entropy(out, Y) for out in model(X)),
        head="head",
        budget="elements:800",
    )
)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.body(self.embedding(ids))))
        return out


_IDS = torch.arange(32).view(4, 8) % 20
ROWS.add("tied weights: the output layer is the embedding")(
    training(
        _Tied,
        _IDS,
        lambda model: F.cross_entropy(model(_IDS).flatten(0, 1), _IDS.flatten().roll(1)),
        head=None,
        budget="elements:400",
    )
)


# -- losses of several models --------------------------------------------------------------------------


@ROWS.add("two prepared models in one loss (CLIP)")
def _two_towers(side: Side) -> None:
    one, other = perceptron(), perceptron(16)
    first, second = side.prepare(one, X), side.prepare(other, X)
    optimizer = first.attach(sgd([*one.parameters(), *other.parameters()]))
    second.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(one(X) @ other(X.flip(1)).T, torch.arange(16)).backward()
        optimizer.step()


@ROWS.add("a frozen teacher beside (distillation)")
def _teacher(side: Side) -> None:
    teacher, student = perceptron(32).eval().requires_grad_(False), perceptron()
    tuner = side.prepare(student, X)
    optimizer = tuner.attach(sgd(student.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        aim = teacher(X).softmax(1)
        (F.kl_div(student(X).log_softmax(1), aim, reduction="batchmean") + loss_of(student)).backward()
        optimizer.step()


@ROWS.add("a frozen, differentiated network behind the model (perceptual loss)")
def _perceptual(side: Side) -> None:
    judge = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).double().requires_grad_(False)
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(judge(model(X)), torch.ones(16, 8, dtype=torch.float64)).backward()
        optimizer.step()


@ROWS.add("GAN: a prepared generator, a discriminator whose flags are toggled")
def _generator(side: Side) -> None:
    generator, judge = perceptron(), nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    tuner = side.prepare(generator, X)
    mine, theirs = tuner.attach(sgd(generator.parameters())), sgd(judge.parameters(), 0.05)
    for _ in range(3):
        judge.requires_grad_(True)
        theirs.zero_grad()
        (judge(generator(X).detach()).mean() - judge(vectors(16, 3)).mean()).backward()
        theirs.step()
        judge.requires_grad_(False)
        mine.zero_grad()
        judge(generator(X)).mean().neg().backward()
        mine.step()
    side.result("judge", judge.get_parameter("0.weight"))


@ROWS.add(
    "GAN: both prepared, flags of the discriminator toggled", told="flags of all frozen parameters were set to true"
)
def _toggled(side: Side) -> None:
    generator, judge = perceptron(), nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    one, other = side.prepare(generator, X), side.prepare(judge, X[:, :3], budget="elements:100")
    mine, theirs = one.attach(sgd(generator.parameters())), other.attach(sgd(judge.parameters(), 0.05))
    for _ in range(3):
        judge.requires_grad_(True)
        theirs.zero_grad()
        (judge(generator(X).detach()).square().mean() - judge(vectors(16, 3)).mean()).backward()
        theirs.step()
        judge.requires_grad_(False)
        mine.zero_grad()
        judge(generator(X)).mean().neg().backward()
        mine.step()


class _Around(nn.Module):
    """A model whose forward calls one that is no part of it: a list hides it from ``state_dict()``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.head, self.outside = nn.Linear(12, 12), nn.Linear(3, 3), [inner]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.gelu(self.outside[0](F.relu(self.first(x)))))
        return out


_BUDGETS: dict[str, dict[str, Any]] = {"": {"budget": "elements:200"}, " under a peak budget": {"over": 1.2}}
for _name, _budget in _BUDGETS.items():
    ROWS.add("a frozen teacher in a list, inside of forward" + _name)(
        training(lambda: _Around(perceptron().requires_grad_(False)), **_budget)
    )


_TRAINS = r"trains a weight that is no part of it, of shape \(24, 12\): make its module a part of the model"


@ROWS.add("a model that trains in a list, inside of forward", refused=_TRAINS)
def _outside(side: Side) -> None:
    side.prepare(_Around(perceptron()).double(), X)


@ROWS.add("a prepared model in a list, inside of the forward of another", refused=_TRAINS)
def _inside(side: Side) -> None:
    inner = perceptron()
    side.prepare(inner, X)
    side.prepare(_Around(inner).double(), X)


@ROWS.add(
    "a prepared model called inside of the forward of another, later",
    refused=r"a prepared model was called inside of the forward pass of another one: call it behind",
)
def _nested(side: Side) -> None:
    inner = perceptron().requires_grad_(False)
    outer = _Around(inner).double()
    side.prepare(outer, X)
    side.prepare(inner.requires_grad_(True), X)
    loss_of(outer)


@ROWS.add("a prepared model as a part of another", refused=r"^refused: 0 of this Sequential is prepared already: call")
def _part(side: Side) -> None:
    inner = perceptron()
    side.prepare(inner, X)
    side.prepare(nn.Sequential(inner, nn.ReLU(), nn.Linear(3, 3)).double(), X)


@ROWS.add("GAN: a prepared discriminator, called twice a step")
def _discriminator(side: Side) -> None:
    judge, generator = perceptron(), nn.Linear(5, 12).double()
    tuner = side.prepare(judge, X)
    optimizer, other = tuner.attach(sgd(judge.parameters())), sgd(generator.parameters())
    for _ in range(3):
        fake = generator(vectors(16, 5))
        optimizer.zero_grad()
        (loss_of(judge) + judge(fake.detach()).square().mean()).backward()
        optimizer.step()
        other.zero_grad()
        loss_of(judge, fake).backward()
        other.step()
    side.result("generator", generator.weight)


@ROWS.add("an auxiliary head that trains in another loop")
def _auxiliary(side: Side) -> None:
    model, probe = perceptron(), nn.Linear(3, 2).double()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd([*model.parameters(), *probe.parameters()]))
    for _ in range(2):
        optimizer.zero_grad()
        out = model(X)
        (F.cross_entropy(out, Y) + F.cross_entropy(probe(out), Y % 2)).backward()
        optimizer.step()
    side.result("probe", probe.weight)
    train(model, optimizer, 1)
