"""A small network that trains by channel, with any optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Residual, normal, seeded
from trady.policies import Evidence

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adafactor of transformers": lambda p: importlib.import_module("transformers.optimization").Adafactor(
        p, lr=0.01, relative_step=False, scale_parameter=False
    ),
}  # fmt: skip

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def data(batches: int = 8, batch: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x = normal(batches * batch, 3, 9, 9, seed=seed)
    y = (x.mean((1, 2, 3)) * 40).long().remainder(5)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def train(
    tuner: trady.Tuner, optimizer: torch.optim.Optimizer, epochs: range = range(2), steps: int = 4
) -> list[float]:
    losses = []
    for epoch in epochs:
        tuner.resample(epoch)
        for x, y in data()[:steps]:
            optimizer.zero_grad()
            loss = F.cross_entropy(tuner.model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def observed(tuner: trady.Tuner, batches: Any, loss: Callable[[Any, Any], Tensor] | None = F.cross_entropy) -> Evidence:
    """What the policy wanted to have measured."""
    evidence = tuner.observe(batches, loss)
    assert evidence is not None
    return evidence


def prepared(model: nn.Module | None = None, **options: Any) -> trady.Tuner:
    model = seeded(Residual) if model is None else model
    return trady.prepare(model, data()[0][0], **{"budget": "elements:1500", "policy": "dynamic-random", **options})
