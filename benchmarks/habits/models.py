"""Models as people write them: random paths, looks at values, parts without a gradient, any inputs and losses."""

from __future__ import annotations

import copy
import random
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from benchmarks.habits.networks import X, Y, loss_of, perceptron, sgd, train, vectors
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()


def _training(build: Callable[[], nn.Module], example: Any = X, loss: Any = None, **options: Any) -> Program:
    """Three steps; without a loss the model gives scores."""

    def program(side: Side) -> None:
        torch.manual_seed(0)
        model = build().double()
        tuner = side.prepare(model, example, **options)
        optimizer = tuner.attach(sgd(model.parameters()))
        for _ in range(3):
            optimizer.zero_grad()
            side.step(lambda: (loss_of(model) if loss is None else loss(model)).backward())
            optimizer.step()

    return program


# -- random paths --------------------------------------------------------------------------------------


class _Deep(nn.Module):
    """Four residual layers, each left out at random while training."""

    def __init__(self, skips: Callable[[], Any]) -> None:
        super().__init__()
        self.stem, self.head, self.skips = nn.Linear(12, 16), nn.Linear(16, 3), skips
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if not (self.training and self.skips()):
                x = x + layer(x)
        out: Tensor = self.head(F.relu(x))
        return out


_SKIPS: dict[str, Callable[[], Any]] = {
    "torch.rand([]) < p": lambda: torch.rand([]) < 0.4,
    "torch.bernoulli": lambda: bool(torch.bernoulli(torch.tensor(0.4))),
    "random.random() < p": lambda: random.random() < 0.4,
    "np.random.uniform() < p": lambda: np.random.uniform() < 0.4,  # noqa: NPY002 - as models do it
}
for _name, _skips in _SKIPS.items():
    ROWS.add(f"layerdrop: {_name}")(_training(partial(_Deep, _skips), budget="elements:2000"))
ROWS.add("layerdrop under a peak budget")(_training(lambda: _Deep(_SKIPS["torch.rand([]) < p"]), over=1.2))


class _StochasticDepth(nn.Module):
    """timm's: whole samples of a residual branch are zeroed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            kept = x.new_empty(len(x), 1).bernoulli_(0.7) / 0.7 if self.training else 1.0
            x = x + kept * F.gelu(layer(x))
        out: Tensor = self.head(x)
        return out


ROWS.add("stochastic depth by sample (timm's DropPath)")(_training(_StochasticDepth, budget="elements:800"))
ROWS.add("dropout, the same random numbers")(
    _training(lambda: nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3)))
)


# -- looks at values -----------------------------------------------------------------------------------


class _Looks(nn.Module):
    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.second(self.look(F.gelu(self.first(x))))))
        return out


def _asserts(x: Tensor) -> Tensor:
    assert torch.isfinite(x).all(), "not finite"
    return x


def _clamps(x: Tensor) -> Tensor:
    """As transformers do it under float16."""
    return x.clamp(-1e4, 1e4) if torch.isinf(x).any() or torch.isnan(x).any() else x


def _masked(x: Tensor) -> Tensor:
    chosen = x[x[:, 0] > x[:, 0].median()]
    return x + chosen.mean(0)


def _sampled(x: Tensor) -> Tensor:
    out: Tensor = Normal(x, F.softplus(x) + 0.1).rsample()
    return out


def _entropy(x: Tensor) -> Tensor:
    out: Tensor = x + Categorical(logits=x).entropy()[:, None]
    return out


def _matched(x: Tensor) -> Tensor:
    order = sorted(range(len(x)), key=x.detach()[:, 0].tolist().__getitem__)
    return x[torch.tensor(order)] + x


def _logged(x: Tensor) -> Tensor:
    float(x.mean()), x.detach().cpu().numpy().max()
    return x


_LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "assert torch.isfinite(x).all()": _asserts,
    "if torch.isinf(x).any(): clamp": _clamps,
    "x[mask]: an index made of values": _masked,
    "torch.distributions: Normal(…).rsample()": _sampled,
    "torch.distributions: Categorical(logits=x).entropy()": _entropy,
    "a matching: sorted(x.tolist())": _matched,
    "x.mean().item() and x.numpy() for a log": _logged,
}
for _name, _look in _LOOKS.items():
    ROWS.add(_name)(_training(partial(_Looks, _look), budget="elements:800"))
ROWS.add("a branch on values, on the meta device", refused=r"sum\(\) > 1e6.*real example|real example")(
    lambda side: side.prepare(_Looks(lambda x: x if x.sum() > 1e6 else x * 0.5).double().to("meta"), X.to("meta"))
)


class _Transcribes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(F.gelu(self.first(x))).log_softmax(-1)
        known = labels >= 0
        steps = torch.full((len(x),), x.shape[1])
        return F.ctc_loss(scores.transpose(0, 1), labels.masked_select(known), steps, known.sum(1))


_SPEECH, _LABELS = vectors(18).view(2, 9, 12), torch.tensor([[1, 2, 3], [4, -1, -1]])
ROWS.add("ctc_loss inside of the model")(
    _training(_Transcribes, (_SPEECH, _LABELS), lambda model: model(_SPEECH, _LABELS))
)


# -- parts without a gradient --------------------------------------------------------------------------


class _Momentum(nn.Module):
    """MoCo: an encoder, one that follows it, and keys of the second."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.online, self.predictor, self.how = perceptron(16), nn.Linear(3, 3), how
        self.target = copy.deepcopy(self.online)

    @torch.no_grad()
    def follow(self) -> None:
        for mine, theirs in zip(self.online.parameters(), self.target.parameters(), strict=False):
            if self.how == "data":
                theirs.data = theirs.data * 0.9 + mine.data * 0.1
            else:
                theirs.mul_(0.9).add_(mine, alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        query = self.predictor(self.online(x))
        if self.how == "detach":
            keys = self.target(x.flip(1)).detach()
        else:
            with torch.no_grad():
                keys = self.target(x.flip(1))
        return F.mse_loss(query, keys + 1)


for _how in ("no_grad", "detach", "data"):
    ROWS.add(f"a momentum encoder inside of forward ({_how})")(
        _training(partial(_Momentum, _how), loss=lambda model: model(X))
    )


class _FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = perceptron(16), nn.Linear(3, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        out: Tensor = self.head(F.relu(self.neck(x)))
        return out


ROWS.add("a backbone under no_grad inside of forward")(_training(_FrozenBackbone, budget="elements:40"))


class _StopGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        out: Tensor = self.head(x * torch.sigmoid(self.gate(x.detach())))
        return out


ROWS.add("x.detach() on one of two ways")(_training(_StopGradient, budget="elements:800"))


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
    ROWS.add(f"one argument: {_name}")(_training(partial(_Of, _get), (_given,), partial(_scored, _given)))
ROWS.add("arguments by name: model(**batch)")(
    _training(
        lambda: _OfNames(lambda data: data),
        {"x": X, "scale": _SCALE},
        lambda model: F.cross_entropy(model(x=X, scale=_SCALE), Y),
    )
)
ROWS.add("output: a dict of scores")(
    _training(lambda: _Answers(), loss=lambda model: F.cross_entropy((out := model(X))["scores"], Y) + out["norm"])
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
    _training(
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
    _training(
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
