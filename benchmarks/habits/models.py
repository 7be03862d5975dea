"""Models as people write them: random paths, looks at values, parts without a gradient."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from benchmarks.habits.networks import X, loss_of, perceptron, sgd, vectors
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()


def training(build: Callable[[], nn.Module], example: Any = X, loss: Any = None, **options: Any) -> Program:
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
    ROWS.add(f"layerdrop: {_name}")(training(partial(_Deep, _skips), budget="elements:2000"))
ROWS.add("layerdrop under a peak budget")(training(lambda: _Deep(_SKIPS["torch.rand([]) < p"]), over=1.2))


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


ROWS.add("stochastic depth by sample (timm's DropPath)")(training(_StochasticDepth, budget="elements:800"))
ROWS.add("dropout, the same random numbers")(
    training(lambda: nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3)))
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
    ROWS.add(_name)(training(partial(_Looks, _look), budget="elements:800"))
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
    training(_Transcribes, (_SPEECH, _LABELS), lambda model: model(_SPEECH, _LABELS))
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
        training(partial(_Momentum, _how), loss=lambda model: model(X))
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


ROWS.add("a backbone under no_grad inside of forward")(training(_FrozenBackbone, budget="elements:40"))


class _StopGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        out: Tensor = self.head(x * torch.sigmoid(self.gate(x.detach())))
        return out


ROWS.add("x.detach() on one of two ways")(training(_StopGradient, budget="elements:800"))
