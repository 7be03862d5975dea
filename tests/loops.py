"""Models and batches whose budgets loops are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from trady.errors import BudgetError


class Block(nn.Module):
    """Attention whose matrix exists as a whole, and a feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        out: Tensor = x + self.narrow(F.gelu(self.wide(x)))
        return out


class Text(nn.Module):
    """Token ids [N, T] to scores [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks = nn.Embedding(40, 32), nn.Sequential(Block(32), Block(32))
        self.head, self.runs = nn.Linear(32, 3), 0

    def forward(self, ids: Tensor) -> Tensor:
        self.runs += 1
        out: Tensor = self.head(self.blocks(self.embedding(ids)).mean(1))
        return out


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1), nn.GELU(),
        nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def ids(samples: int, length: int) -> Tensor:
    return torch.randint(40, (samples, length), generator=torch.Generator().manual_seed(samples))


def images(samples: int, size: int) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(samples))


def minimum(model: nn.Module, x: Any, **options: Any) -> int:
    with pytest.raises(BudgetError) as refused:
        trady.plan(model, x, budget="1 B", **options)
    least = refused.value.least_amount  # type: ignore[attr-defined]
    assert isinstance(least, int)
    return least


def tuned(
    model: nn.Module, x: Any, over_minimum: float, make: Callable[..., torch.optim.Optimizer], **options: Any
) -> tuple[trady.Tuner, torch.optim.Optimizer, int]:
    budget = int(minimum(model, x, **options) * over_minimum)
    tuner = trady.prepare(model, x, budget=f"{budget} B", policy="dynamic-random", **options)
    return tuner, tuner.attach(make(tuner.parameters(), lr=0.01)), budget


def wide() -> nn.Module:
    """Eight layers of 256 KiB."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3 * 144, 256)]
    for _ in range(8):
        layers += [nn.ReLU(), nn.Linear(256, 256)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 3))
