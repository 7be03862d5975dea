"""Single training steps, to be measured and timed outside a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

import torch

from trady.training.batch import cross_entropy, forward
from trady.training.trainer import FullTrainer, Trainer, TunerTrainer
from trady.tuner.tuner import Tuner

if TYPE_CHECKING:
    from trady.cli.example import Example
    from trady.memory import Ledger
    from trady.planning.request import Request

#: Small enough that repeated steps on one batch leave the weights where they are.
RATE = 1e-6


class Step:
    """A training step on one batch, again and again."""

    def __init__(self, trainer: Trainer, example: Example) -> None:
        self.trainer = trainer
        self.example = example
        self.optimizer = trainer.attach(torch.optim.SGD(trainer.parameters(), lr=RATE))
        trainer.set_mode(training=True)
        if trainer.observation_due:
            trainer.observe([(example.images, example.labels)], cross_entropy, lambda done, passes: None)
        trainer.start_epoch(0)

    def __call__(self) -> None:
        """Run forward, backward and update."""
        output = forward(self.trainer.model, self.example.images)
        cross_entropy(output, self.example.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def ledger(self) -> Ledger:
        """Measure a step, and an inference pass beside it."""
        return self.trainer.ledger(self, inference=True)

    def close(self) -> None:
        """Disarm the model."""
        self.trainer.finish()


def full_step(example: Example) -> Step:
    """Return a step of plain full fine-tuning."""
    return Step(FullTrainer(example.model), example)


def tuned_step(example: Example, request: Request) -> Step:
    """Return a step inside a budget."""
    return Step(TunerTrainer(Tuner(request.decide(example.model, example.images))), example)


def step_seconds(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Return the median time of each step, taken in turns so that all see the same machine."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}
