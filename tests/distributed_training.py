"""One short training, in one process or in several that share the same global batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trady
from tests.models import Residual, normal, seeded, snapshot
from tests.recomputed_models import recomputed_model, tokens

GLOBAL_BATCH = 12


momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@dataclass
class Told:
    """What a process has seen of it."""

    losses: list[float] = field(default_factory=list)
    selections: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    nbytes: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        network: ``CNN``, ``BERT`` or ``Llama``.
        recompute: As of :func:`trady.prepare`.
        optimizer: Makes the optimizer from the tuner's parameters.
        accumulation: Passes a step.
        head: As of :func:`trady.prepare`.
        wrap: ``""``, or when DistributedDataParallel comes: ``before`` or ``after`` the model is prepared.
        steps: Steps.
        uneven: Whether the batches of the processes differ in length, so that none compares with one process.
    """

    network: str = "CNN"
    recompute: str = "auto"
    optimizer: Callable[[Any], torch.optim.Optimizer] = momentum
    accumulation: int = 1
    head: Any = "auto"
    wrap: str = ""
    steps: int = 4
    uneven: bool = False
    budget: str = "elements:1500"

    def __call__(self, rank: int, processes: int) -> Told:
        """Train."""
        model, example = self.build()
        wrapped: nn.Module = DistributedDataParallel(model) if self.wrap == "before" else model
        tuner = trady.prepare(
            model, example, budget=self.budget, seed=3, recompute=self.recompute, head=self.head,
            ranking="structural", accumulates=self.accumulation > 1,
        )  # fmt: skip
        optimizer = tuner.attach(self.optimizer(tuner.parameters()))
        wrapped = DistributedDataParallel(model) if self.wrap == "after" else wrapped
        told = Told()
        for step in range(self.steps):
            if step % 2 == 0:
                tuner.resample(step // 2)
                told.selections.append(tuner.selection.digest)
            run = partial(self.step, step, rank, processes, wrapped, tuner, optimizer)
            ledger = tuner.ledger(partial(_kept, told.losses, run), inference=False)
            told.nbytes.append(ledger.averaged_bytes)
            told.calls.append(ledger.averaging_calls)
        told.weights = snapshot(tuner.finish())
        return told

    def build(self) -> tuple[nn.Module, Any]:
        """The model, in float64, and its example."""
        if self.network == "CNN":
            return seeded(Residual).double(), normal(GLOBAL_BATCH, 3, 9, 9, dtype=torch.float64)
        model, _ = recomputed_model(self.network)
        return model, {"input_ids": tokens(GLOBAL_BATCH, 11)}

    def batches(self, step: int, rank: int, processes: int) -> Iterator[Any]:
        """A process's share of the global batch of a step, pass by pass."""
        for part in range(self.accumulation):
            rows = slice(part * processes + rank, None, self.accumulation * processes)
            if self.network == "CNN":
                yield normal(GLOBAL_BATCH, 3, 9, 9, seed=step, dtype=torch.float64)[rows]
            else:
                length = 5 + 3 * rank if self.uneven else 11
                yield {"input_ids": tokens(GLOBAL_BATCH, length, seed=step)[rows]}

    def step(
        self,
        step: int,
        rank: int,
        processes: int,
        model: nn.Module,
        tuner: trady.Tuner,
        optimizer: torch.optim.Optimizer,
    ) -> float:
        """Do a step; return its loss here."""
        total = 0.0
        for part, batch in enumerate(self.batches(step, rank, processes)):
            where: Any = model if isinstance(model, DistributedDataParallel) else tuner
            with nullcontext() if part == self.accumulation - 1 else where.no_sync():
                output = model(**batch) if isinstance(batch, dict) else model(batch)
                output = output if isinstance(output, Tensor) else output.logits
                loss = output.square().mean() / self.accumulation
                loss.backward()
                total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total


def _kept(losses: list[float], step: Callable[[], float]) -> None:
    losses.append(step())
