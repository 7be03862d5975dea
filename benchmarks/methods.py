"""The methods that are compared, each as a training step that can be run, measured and timed.

Each takes a task of its own: full fine-tuning changes running statistics, TraDy arms the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import trady
from benchmarks.workloads import Task, Workload

#: Small enough that repeated steps on one batch leave the weights where they are.
RATE = 1e-6


@dataclass(frozen=True)
class Step:
    """A training step on one batch, to be run again and again.

    Attributes:
        run: Forward, backward and, where something trains, the update.
        ledger: Runs it once and accounts for its tensor memory.
    """

    run: Callable[[], None]
    ledger: Callable[[], trady.Ledger]


@dataclass(frozen=True)
class TunedStep(Step):
    """A step of TraDy.

    Attributes:
        tuner: The tuner of the armed model.
    """

    tuner: trady.Tuner


@contextmanager
def full_fine_tuning(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Plain PyTorch in training mode; every parameter trains."""
    task.model.requires_grad_(True).train()
    run = _sgd_step(task, torch.optim.SGD(task.model.parameters(), lr=RATE))
    yield Step(run, partial(trady.measure, run, task.model))


@contextmanager
def head_only(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Plain PyTorch; the last linear layer trains behind a frozen network (statistics fixed)."""
    task.model.requires_grad_(False)
    _train_with_fixed_statistics(task.model)
    head = [module for module in task.model.modules() if isinstance(module, nn.Linear)][-1].requires_grad_(True)
    run = _sgd_step(task, torch.optim.SGD(head.parameters(), lr=RATE))
    yield Step(run, partial(trady.measure, run, task.model))


@contextmanager
def trady_step(
    workload: Workload, task: Task, seed: int = 0, ranking: trady.LayerRanking | None = None
) -> Iterator[TunedStep]:
    """TraDy, armed as the workload says: the drawn channels and the head train."""
    tuner = workload.arm(task, seed, ranking)
    task.model.train()
    run = _sgd_step(task, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=RATE)))
    try:
        yield TunedStep(run, partial(tuner.ledger, run), tuner)
    finally:
        tuner.finish()


@contextmanager
def floor(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Plain PyTorch; forward and input gradients only: no weight trains, the input requires a gradient."""
    task.model.requires_grad_(False)
    _train_with_fixed_statistics(task.model)
    task.images.requires_grad_(True)

    def run() -> None:
        task.loss().backward()
        task.images.grad = None

    yield Step(run, partial(trady.measure, run, task.model))


Method = Callable[..., AbstractContextManager[Step]]

#: In the order of the tables. Each takes a workload, a task and, if it likes, a seed.
METHODS: dict[str, Method] = {
    "full": full_fine_tuning,
    "head": head_only,
    "trady": trady_step,
    "floor": floor,
}

TITLES = {
    "full": "full fine-tuning",
    "head": "head only",
    "trady": "TraDy",
    "floor": "floor (input gradients only)",
}


def _sgd_step(task: Task, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        task.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _train_with_fixed_statistics(model: nn.Module) -> None:
    """Training mode, so that dropout is as in full fine-tuning; batch normalisation in evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
