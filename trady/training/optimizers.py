"""Optimizers by name; the paper's is plain SGD. The stepper passes ``channel_clip`` to those of trady.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from trady import optim
from trady.errors import TrainingError
from trady.optim.in_backward import update_forms
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.optimizer_probe import optimizer_memory

#: Makes an optimizer over parameters.
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

NAMES = ("sgd", "adam", "adamw", "sgd-in-backward", "adamw-in-backward")


def optimizer_factory(
    optimizer: str | OptimizerFactory, lr: float | None, momentum: float, weight_decay: float
) -> OptimizerFactory:
    """Return the function that makes the optimizer; a user's own is returned as it is."""
    if not isinstance(optimizer, str):
        return optimizer
    assert lr is not None  # a name has a default (rates.py)
    if optimizer == "sgd":
        return lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if optimizer == "sgd-in-backward":
        return lambda p: optim.SGD(p, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        raise TrainingError(f"momentum belongs to sgd; {optimizer} has its own betas")
    if optimizer == "adam":
        return lambda p: torch.optim.Adam(p, lr=lr, weight_decay=weight_decay)
    if optimizer == "adamw":
        return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay)
    if optimizer == "adamw-in-backward":
        return lambda p: optim.AdamW(p, lr=lr, weight_decay=weight_decay)
    raise TrainingError(f"no optimizer {optimizer!r}; there are {', '.join(NAMES)}")


def memory_of(factory: OptimizerFactory, device: torch.device) -> OptimizerMemory:
    """Return what an optimizer takes beside parameters and gradients, by making one over a single element."""
    one = nn.Parameter(torch.zeros(1, device=device))
    made = factory([one])
    return replace(optimizer_memory(made), in_backward=update_forms([made], [one]))
