"""The methods that are compared, each as a training step that can be run, measured and timed.

Each takes a task of its own: full fine-tuning changes running statistics, LoRA and TraDy change the model. All
step with plain SGD but GaLore, which is an Adam. Those that train the whole network run in training mode;
the others keep the statistics of batch normalisation fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import trady
from benchmarks.floor import input_gradients
from benchmarks.galore import galore_optimizer
from benchmarks.skipped import SkippedError
from benchmarks.tasks import Task
from benchmarks.workloads import Workload
from trady.estimates.adapters import RANK
from trady.estimates.heads import train_with_fixed_statistics
from trady.estimates.methods import Settings, read_method

#: From what trains to its optimizer.
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

#: Small enough that repeated steps on one batch leave the weights where they are.
RATE = 1e-6


@dataclass(frozen=True)
class Step:
    """A training step on one batch, to be run again and again.

    Attributes:
        run: Forward, backward and, where something trains, the update.
        ledger: Runs it once and accounts for its tensor memory; the inference pass is not among it.
        trainable_parameters: Elements that an update changes.
        note: What a reader should know of this method on this model.
    """

    run: Callable[[], None]
    ledger: Callable[[], trady.Ledger]
    trainable_parameters: int
    note: str = ""


@dataclass(frozen=True)
class TunedStep(Step):
    """A step of TraDy.

    Attributes:
        tuner: The tuner of the armed model.
        task: Its task.
        optimizer: What steps.
    """

    tuner: trady.Tuner = field(kw_only=True)
    task: Task = field(kw_only=True)
    optimizer: torch.optim.Optimizer = field(kw_only=True)

    def captured(self) -> Callable[[], None]:
        """The same step with its forward and backward pass replayed (``Tuner.capture``), in epoch 1.

        While a ranking is being learnt, in epoch 0, passes tell the host norms and cannot be replayed.
        """
        self.tuner.resample(1)

        def passes() -> Tensor:
            loss = self.task.run()
            loss.backward()
            return loss

        replayed = self.tuner.capture(passes)

        def run() -> None:
            replayed()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return run


def plain_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """SGD without momentum, at a rate that leaves the weights where they are."""
    return torch.optim.SGD(parameters, lr=RATE)


def plain_step(task: Task, optimizer: torch.optim.Optimizer | OptimizerFactory = plain_sgd, note: str = "") -> Step:
    """Return the step of whatever of the task's model requires a gradient."""
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    run = _update(task, optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(trained))
    return Step(run, partial(trady.measure, run, task.model, inference=False), _elements(trained), note)


def _update(task: Task, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        task.run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def plain(
    workload: Workload,
    task: Task,
    seed: int = 0,
    *,
    name: str,
    optimizer: OptimizerFactory = plain_sgd,
    rank: int = RANK,
) -> Iterator[Step]:
    """Plain PyTorch, on the model as :mod:`trady.estimates.methods` makes it."""
    settings = Settings(rank, block_classes=workload.blocks, convolutions=workload.kind == "cnn")
    note = read_method(name).apply(task.model, settings)
    yield plain_step(task, optimizer, note)


Method = Callable[..., AbstractContextManager[Step]]

#: Plain PyTorch in training mode; every parameter trains.
full_fine_tuning: Method = partial(plain, name="full")


@contextmanager
def galore(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Full fine-tuning with moments of projected gradients (:mod:`benchmarks.galore`)."""
    task.model.requires_grad_(True).train()
    optimizer, note = galore_optimizer(task.model, RATE)
    step = plain_step(task, optimizer, note)
    step.run()  # the moments are there from the second step on
    yield step


@contextmanager
def trady_step(
    workload: Workload,
    task: Task,
    seed: int = 0,
    ranking: trady.LayerRanking | None = None,
    policy: str | None = None,
    recompute: str = "auto",
    optimizer: OptimizerFactory = plain_sgd,
    max_step_flops: float | None = None,
) -> Iterator[TunedStep]:
    """TraDy, armed as the workload says: the drawn channels and the head train."""
    tuner = workload.arm(task, seed, ranking, policy, recompute, max_step_flops)
    task.model.train()
    attached = tuner.attach(optimizer(tuner.parameters()))
    run = _update(task, attached)
    ledger, trainable = partial(tuner.ledger, run, inference=False), _elements(tuner.parameters())
    try:
        yield TunedStep(run, ledger, trainable, tuner=tuner, task=task, optimizer=attached)
    finally:
        tuner.finish()


@contextmanager
def static_random(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """PaCA's rule (arXiv 2503.01905) in the same engine: channels drawn once, at random."""
    with trady_step(workload, task, seed, policy=workload.static_policy) as step:
        yield step


@contextmanager
def trady_keep(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """TraDy, but the backward pass recomputes nothing: the fastest step, and more memory."""
    if workload.kind == "cnn":
        raise SkippedError("these networks have nothing that would be recomputed")
    with trady_step(workload, task, seed, recompute="none") as step:
        yield step


@contextmanager
def floor(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Plain PyTorch; forward and input gradients only (:mod:`benchmarks.floor`): nothing trains."""
    task.model.requires_grad_(False)
    train_with_fixed_statistics(task.model)
    with input_gradients(task) as run:
        yield Step(run, partial(trady.measure, run, task.model, inference=False), 0)


#: In the order of the tables. Each takes a workload, a task and, if it likes, a seed.
METHODS: dict[str, Method] = {
    "full": full_fine_tuning,
    **{name: partial(plain, name=name) for name in ("head", "bitfit", "lora", "lora-checkpoint", "checkpoint")},
    "galore": galore,
    "static-random": static_random,
    "trady": trady_step,
    "trady-keep": trady_keep,
    "floor": floor,
}

TITLES = {
    "full": "full fine-tuning",
    "head": "head only",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "lora-checkpoint": "LoRA + checkpointing",
    "checkpoint": "checkpointing",
    "galore": "GaLore",
    "static-random": "static random",
    "trady": "TraDy",
    "trady-keep": "TraDy, nothing recomputed",
    "floor": "floor (input gradients only)",
}

#: What TraDy's peak is held against: not the head alone, which trains no body, nor static-random, which is
#: the same engine with other draws.
PEERS = ("full", "bitfit", "lora", "lora-checkpoint", "checkpoint", "galore")
