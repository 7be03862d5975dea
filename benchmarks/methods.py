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
from torch import Tensor, nn

import trady
from benchmarks.checkpointing import checkpoint_blocks
from benchmarks.floor import input_gradients
from benchmarks.galore import galore_optimizer
from benchmarks.heads import head_of, train_with_fixed_statistics
from benchmarks.lora import RANK, add_adapters
from benchmarks.skipped import SkippedError
from benchmarks.tasks import Task
from benchmarks.workloads import Workload

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
def full_fine_tuning(
    workload: Workload, task: Task, seed: int = 0, optimizer: OptimizerFactory = plain_sgd
) -> Iterator[Step]:
    """Plain PyTorch in training mode; every parameter trains."""
    task.model.requires_grad_(True).train()
    yield plain_step(task, optimizer)


@contextmanager
def head_only(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Plain PyTorch; the last linear layer trains behind a frozen network (statistics fixed)."""
    head = head_of(task.model)
    if head is None:
        raise SkippedError("the output layer is tied to the embedding: there is no head that could train alone")
    task.model.requires_grad_(False)
    train_with_fixed_statistics(task.model)
    head.requires_grad_(True)
    yield plain_step(task)


@contextmanager
def bitfit(workload: Workload, task: Task, seed: int = 0) -> Iterator[Step]:
    """Only biases train, those of normalisation layers and of the head included (arXiv 2106.10199)."""
    biases = [parameter for name, parameter in task.model.named_parameters() if name.rpartition(".")[2] == "bias"]
    body = set(task.model.parameters()) - set((head_of(task.model) or nn.Module()).parameters())
    if body.isdisjoint(biases):
        raise SkippedError("the network has no bias in front of its head")
    task.model.requires_grad_(False)
    train_with_fixed_statistics(task.model)
    for bias in biases:
        bias.requires_grad_(True)
    yield plain_step(task)


@contextmanager
def lora(
    workload: Workload,
    task: Task,
    seed: int = 0,
    checkpoint: bool = False,
    optimizer: OptimizerFactory = plain_sgd,
    rank: int = RANK,
) -> Iterator[Step]:
    """Low-rank adapters of peft beside frozen weights (:mod:`benchmarks.lora`); statistics fixed."""
    where = f", {checkpoint_blocks(task.model, workload.blocks)}" if checkpoint else ""
    note = add_adapters(task.model, rank, convolutions=workload.kind == "cnn")
    train_with_fixed_statistics(task.model)
    yield plain_step(task, optimizer, note + where)


@contextmanager
def checkpointing(
    workload: Workload, task: Task, seed: int = 0, optimizer: OptimizerFactory = plain_sgd
) -> Iterator[Step]:
    """Full fine-tuning that recomputes each block in the backward pass (:mod:`benchmarks.checkpointing`)."""
    task.model.requires_grad_(True).train()
    yield plain_step(task, optimizer, checkpoint_blocks(task.model, workload.blocks))


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
) -> Iterator[TunedStep]:
    """TraDy, armed as the workload says: the drawn channels and the head train."""
    tuner = workload.arm(task, seed, ranking, policy, recompute)
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


Method = Callable[..., AbstractContextManager[Step]]

#: In the order of the tables. Each takes a workload, a task and, if it likes, a seed.
METHODS: dict[str, Method] = {
    "full": full_fine_tuning,
    "head": head_only,
    "bitfit": bitfit,
    "lora": lora,
    "lora-checkpoint": partial(lora, checkpoint=True),
    "checkpoint": checkpointing,
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
