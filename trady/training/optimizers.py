"""Optimizers by name; the paper's is plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from trady.errors import TrainingError

#: Makes an optimizer over parameters.
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

NAMES = ("sgd", "adam", "adamw")


def optimizer_factory(
    optimizer: str | OptimizerFactory, lr: float, momentum: float, weight_decay: float
) -> OptimizerFactory:
    """Return what makes the optimizer; one that the user made is taken as it is."""
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer == "sgd":
        return lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        raise TrainingError(f"momentum belongs to sgd; {optimizer} has its own betas")
    if optimizer == "adam":
        return lambda p: torch.optim.Adam(p, lr=lr, weight_decay=weight_decay)
    if optimizer == "adamw":
        return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay)
    raise TrainingError(f"no optimizer {optimizer!r}; there are {', '.join(NAMES)}")
