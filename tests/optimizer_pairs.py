"""An optimizer of trady.optim beside the one of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Residual, normal, seeded

#: One of trady.optim against the one of torch.optim: name and options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "dampening": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "foreach": ("SGD", {"lr": 0.05, "momentum": 0.9, "foreach": True}),
    "fused": ("SGD", {"lr": 0.05, "fused": True}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "fused AdamW": ("AdamW", {"lr": 0.01, "fused": True}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
Make = Callable[[Any], torch.optim.Optimizer]


def outer(kind: str) -> Make:
    name, options = KINDS[kind]
    return lambda parameters: getattr(torch.optim, name)(parameters, **options)


def inside(kind: str, **more: Any) -> Make:
    name, options = KINDS[kind]
    return lambda parameters: getattr(trady.optim, name)(parameters, **options, **more)


def images(step: int) -> Tensor:
    return normal(4, 3, 9, 9, seed=step)


def tokens(step: int) -> Tensor:
    return torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)))


def prepared(
    build: Callable[[], nn.Module] = Residual, batch: Callable[[int], Tensor] = images, **options: Any
) -> trady.Tuner:
    return trady.prepare(seeded(build), batch(0), **{"budget": "elements:1500", "policy": "dynamic-random", **options})


def train(
    tuner: trady.Tuner,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], Tensor] = images,
    steps: range = range(9),
    clip: Callable[[], object] = lambda: None,
    schedule: bool = True,
) -> list[float]:
    """Train with a new draw every four steps and a rate that falls."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7) if schedule else None
    losses = []
    for step in steps:
        if step % 4 == 0:
            tuner.resample(step // 4)
        optimizer.zero_grad()
        loss = loss_of(tuner.model, batch(step))
        loss.backward()
        clip()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def states(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    return {(i, name): v for i, state in optimizer.state_dict()["state"].items() for name, v in state.items()}


def assert_same_states(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    a, b = states(left), states(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a)
