"""The small networks and batches of the rows, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vectors(samples: int, features: int = 12, number: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(samples, features, generator=generator, dtype=torch.float64)


def images(samples: int = 4, size: int = 6) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def tokens(samples: int, length: int) -> Tensor:
    return torch.randint(40, (samples, length), generator=torch.Generator().manual_seed(samples))


X, Y = vectors(16), torch.arange(16) % 3


def perceptron(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3)
    ).double()  # fmt: skip


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.SiLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).double()  # fmt: skip


class _Block(nn.Module):
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
        self.embedding, self.blocks = nn.Embedding(40, 16), nn.Sequential(_Block(16), _Block(16))
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embedding(ids)).mean(1))
        return out


def loss_of(model: Callable[..., Any], x: Any = X, y: Tensor = Y) -> Tensor:
    return F.cross_entropy(model(x), y)


def train(model: Callable[..., Any], optimizer: Any, steps: int = 3, x: Any = X, y: Tensor = Y) -> None:
    """Make steps of the commonest loop."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def sgd(parameters: Iterable[Any], lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def own(model: nn.Module) -> list[nn.Parameter]:
    """Return what has a name in the model, without the channels that a prepared one shows."""
    return [p for _, p in model.named_parameters()]
