"""Steps of one model by any method, simulated: peaks, and what fits in a given memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trady.errors import ModelError, TradyError
from trady.estimates.methods import TRADY, Method, Settings
from trady.estimates.report import MOST_SAMPLES, MOST_TOKENS, MethodFit
from trady.estimates.search import largest_within
from trady.estimates.subject import Subject
from trady.model.untouched import switch_mode
from trady.planning.budget import Budget, InfeasibleBudgetError
from trady.planning.decision import Decision
from trady.planning.forecast import share_point
from trady.planning.request import Request
from trady.planning.scopes import PEAK
from trady.quantized.formats import stored_in
from trady.report.units import format_percent
from trady.simulation.meta_copy import meta_copy
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.plain_step import PlainStep, Surroundings, simulate_evaluation, simulate_step
from trady.simulation.simulator import ExampleLoss, form_of
from trady.trace.forward import trace_forward

#: The share of the channels of every layer that is a useful number to train.
SHARE = 0.02

#: A peak that everything fits in.
_BOUNDLESS = 2**62

#: What a step of so many samples and tokens takes, in bytes.
Budgeting = Callable[[int, int | None], int]

#: Says what a long estimate is at.
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Asked:
    """What is asked about every method.

    Attributes:
        optimizer: What the optimizer takes.
        memory: Bytes that a step may take; ``None`` looks for no batch or length.
        autocast: What forward passes compute in under autocast; ``None`` is without it.
        settings: What methods are told.
        loss: What the step makes of the model's output; its own loss, or a cross entropy, where none is given.
        workspace_bytes: What libraries of kernels keep for themselves.
    """

    optimizer: OptimizerMemory
    memory: int | None
    autocast: torch.dtype | None
    settings: Settings
    loss: Callable[[Any], Tensor] | None = None
    workspace_bytes: int = 0


class Estimator:
    """Estimates what steps of one model take.

    The first batch is traced, so that a model that cannot run on it is refused before anything else.

    Args:
        subject: The model and its batches; only read.
        asked: What is asked.

    Raises:
        ModelError: The model is quantised already, or cannot run on its batch.

    """

    def __init__(self, subject: Subject, asked: Asked) -> None:
        if any(stored_in(module) for module in subject.model.modules()):
            raise ModelError(
                "this model is stored quantised: ask about the model before it was, and the methods qlora and "
                "qlora-8bit quantise it"
            )
        self._subject, self._asked = subject, asked
        self._trace = trace_forward(subject.model, subject.batch(subject.batch_size, subject.length), training=True)

    def row(self, method: Method, at: Progress) -> MethodFit:
        """Estimate one method; what it cannot do is said in the row.

        Args:
            method: The method.
            at: Told what is under way.

        """
        subject = self._subject
        at(method.title)
        model = meta_copy(subject.bare)
        try:
            with _without_remarks():
                note = method.apply(model, self._asked.settings)
                found = MethodFit(method.name, method.title, note)
                return self._measured(found, model, at)
        except TradyError as reason:
            return MethodFit(method.name, method.title, refused=str(reason))
        except Exception as error:
            refused = f"a step cannot be simulated ({type(error).__name__}: {error})"
            return MethodFit(method.name, method.title, refused=refused)

    def _measured(self, found: MethodFit, model: nn.Module, at: Progress) -> MethodFit:
        subject, optimizer = self._subject, self._asked.optimizer
        step = self._step(model, subject.batch_size, subject.length)

        def peak_of(count: int, length: int | None) -> int:
            at(f"{found.title}: {_spelled(count, length)}")
            return self._step(model, count, length).peak_bytes

        found = replace(found, trainable_parameters=step.trained, peak_bytes=step.peak_bytes, parts=step.parts)
        found = self._searched(found, peak_of)
        state = optimizer.kept_bytes(form_of(p) for p in model.parameters() if p.requires_grad)
        return replace(found, evaluation_bytes=state + self._evaluation(model))

    def _step(self, model: nn.Module, count: int, length: int | None) -> PlainStep:
        batch = self._subject.batch(count, length)
        return simulate_step(model, batch.packed, self._asked.optimizer, self._surroundings(count, length))

    def _evaluation(self, model: nn.Module) -> int:
        count, length = self._subject.batch_size, self._subject.length
        switch_mode(model, False)
        return simulate_evaluation(model, self._subject.batch(count, length).packed, self._surroundings(count, length))

    def _surroundings(self, count: int, length: int | None) -> Surroundings:
        subject, trace = self._subject, self._trace
        if trace.answers and (count, length) != (subject.batch_size, subject.length):
            trace = trace_forward(subject.model, subject.batch(count, length), training=True)
        asked = self._asked
        loss = None if asked.loss is None else ExampleLoss(asked.loss, subject.batch_size)
        return Surroundings(
            torch.device("cpu"),
            asked.autocast,
            loss,
            answers=trace.answers,
            draws=trace.draws,
            workspace_bytes=asked.workspace_bytes,
        )

    def _searched(self, found: MethodFit, peak_of: Callable[[int, int | None], int]) -> MethodFit:
        """Look for the largest batch and the longest sequence."""
        memory, subject = self._asked.memory, self._subject
        if memory is None:
            return found
        count, length = subject.batch_size, subject.length
        batch = largest_within(lambda n: peak_of(n, length), memory, count, MOST_SAMPLES, found.peak_bytes)
        longest = None
        if length is not None:
            most = subject.longest or MOST_TOKENS
            longest = largest_within(lambda n: peak_of(count, n), memory, length, most, found.peak_bytes)
        return replace(found, largest_batch=batch, longest_sequence=longest)

    # -- TraDy ---------------------------------------------------------------------------------------------

    def smallest_trady(self, at: Progress) -> list[MethodFit]:
        """Estimate TraDy in the smallest budget that is possible, and in one for some channels of every layer."""
        subject, smallest, some = (
            self._subject,
            "TraDy, smallest budget",
            f"TraDy, {format_percent(SHARE)} of the channels",
        )
        found: list[MethodFit] = []
        for title, budget_of in ((smallest, self._least), (some, self._for_share)):
            at(title)

            def peak_of(count: int, length: int | None, title: str = title, budget_of: Budgeting = budget_of) -> int:
                at(f"{title}: {_spelled(count, length)}")
                return budget_of(count, length)

            try:
                row = self._trady(budget_of(subject.batch_size, subject.length), title)
                found.append(self._searched(row, peak_of))
            except TradyError as reason:
                return [*found, MethodFit(TRADY, title, refused=str(reason))]
        return found

    def trady_within(self, budget: int, at: Progress) -> MethodFit:
        """Estimate TraDy in a budget of a step's peak; what is impossible is said in the row."""
        title = f"TraDy in {str(Budget(PEAK, budget)).removeprefix('peak:')}"
        at(title)
        try:
            return self._trady(budget, title)
        except TradyError as reason:
            return MethodFit(TRADY, title, refused=str(reason), budget_bytes=budget)

    def _trady(self, budget: int, title: str) -> MethodFit:
        subject = self._subject
        plan = (decision := self._decided(budget, subject.batch_size, subject.length)).plan(decision.start)
        parts, workspaces = dict(plan.predicted_parts), self._asked.workspace_bytes
        if workspaces:
            parts["workspaces"] = workspaces
        notes = [
            f"{len(plan.recomputed)} of {plan.recomputable} segments recomputed" if plan.recomputable else "",
            "" if plan.cost.channels else "no room for what is drawn first",
        ]
        evaluation = self._evaluation(meta_copy(subject.bare)) + sum(
            parts.get(name, 0) for name in ("compact parameters", "optimizer state")
        )
        return MethodFit(
            TRADY,
            title,
            ", ".join(filter(None, notes)),
            trainable_parameters=plan.cost.compact_bytes // plan.table.weight_element_bytes + plan.head_parameters,
            peak_bytes=(plan.predicted_peak_bytes or 0) + workspaces,
            parts=parts,
            evaluation_bytes=evaluation,
            budget_bytes=budget,
            channels=plan.cost.channels,
            channel_share=plan.cost.channels / max(plan.table.channel_count, 1),
        )

    def _decided(self, budget: int, count: int, length: int | None) -> Decision:
        """Plan for a budget, on a CPU, whose plans have no workspaces."""
        within = Budget(PEAK, max(1, budget - self._asked.workspace_bytes))
        request = Request(budget=within, autocast=self._asked.autocast, loss=self._asked.loss)
        batch = self._subject.batch(count, length)
        return request.decide(self._model, batch, optimizer=self._asked.optimizer, explain=False)

    def _least(self, count: int, length: int | None) -> int:
        """The smallest budget of a batch."""
        try:
            self._decided(1, count, length)
        except InfeasibleBudgetError as error:
            return error.least_amount + self._asked.workspace_bytes
        return 1

    def _for_share(self, count: int, length: int | None) -> int:
        """The peak of a step in which some channels of every layer train, and all is recomputed that may be."""
        decision = self._decided(_BOUNDLESS, count, length)
        return share_point(decision, SHARE).recomputed_peak_bytes + self._asked.workspace_bytes

    @property
    def _model(self) -> nn.Module:
        """The model that is planned for: with its values where they are there and of the dtype that was asked for."""
        subject = self._subject
        floats = {p.dtype for p in subject.model.parameters() if p.is_floating_point()}
        return subject.model if floats <= {subject.dtype} else subject.bare


def _spelled(count: int, length: int | None) -> str:
    return f"{count}" if length is None else f"{count} × {length}"


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep bitsandbytes from logging what it does to every input."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
