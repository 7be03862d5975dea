"""Keeps a loop inside its budget: looks at every forward pass before it runs, and predicts steps that were not planned.

A step can differ from the planned one in the shapes of its batch, in how often the model is called before the backward
pass, in gradients of earlier passes that are still there, and in autocast. Whatever the plan covers costs a comparison
of shapes. Anything else is simulated once; if it does not fit, fewer channels train from then on.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.channels.selection import Selection
from trady.errors import ModelError, TradyError, TradyWarning
from trady.interception.armed import Armed
from trady.model.batch import Batch, batch_of_call
from trady.model.untouched import apart
from trady.ops.context import autocast_dtype_on
from trady.planning.budget import InfeasibleBudgetError, StepTooLargeError
from trady.planning.conditions import Conditions, shapes_of
from trady.planning.decision import Decision
from trady.planning.peaks import Case
from trady.planning.spending import Moment
from trady.report.units import format_bytes
from trady.tuner.draws import Draws
from trady.tuner.gradients import keep_gradient


class _Pass:
    """A forward pass whose graph is alive; whoever holds the graph holds this."""

    __slots__ = ("__weakref__", "_inputs", "returned", "shapes")

    def __init__(self, batch: Batch) -> None:
        self._inputs = tree_map(_let_go, batch.inputs)
        self.shapes = shapes_of(batch)
        self.returned = False  # whether a backward pass has come through

    @property
    def batch(self) -> Batch:
        """The batch as it was, without memory: ids and masks whose values nobody holds any more are ones."""
        return Batch(tree_map(lambda leaf: leaf.found if isinstance(leaf, _Input) else leaf, self._inputs))


class _Input:
    """A tensor that the loop may let go."""

    __slots__ = ("_dtype", "_reference", "_shape")

    def __init__(self, tensor: Tensor) -> None:
        self._reference, self._shape, self._dtype = weakref.ref(tensor), tensor.shape, tensor.dtype

    @property
    def found(self) -> Tensor:
        if (tensor := self._reference()) is not None:
            return tensor
        wide = self._dtype.is_floating_point or self._dtype.is_complex
        return torch.ones(self._shape, dtype=self._dtype, device="meta" if wide else "cpu")


def _let_go(leaf: Any) -> Any:
    return _Input(leaf) if isinstance(leaf, Tensor) else leaf


class Guard:
    """Looks at the forward passes of one tuner.

    Args:
        armed: The armed model.
        draws: What trains.
        trained: Compact parameters and the head.
    """

    def __init__(self, armed: Armed, draws: Draws, trained: Iterable[nn.Parameter]) -> None:
        self._armed, self._draws, self._trained = armed, draws, list(trained)
        self._fits: tuple[object, set[Conditions]] = (None, set())
        self._cases: dict[Conditions, Case | None] = {}
        self._open: list[weakref.ref[_Pass]] = []
        self._now: Batch | None = None
        self._warned: set[str] = set()
        armed.on_forward.append(self._before)
        armed.on_output.append(self._after)

    # -- one forward pass ------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._now = None
        if module is not self._armed.model or not torch.is_grad_enabled():
            return
        if self._armed.selection is not self._draws.selection:  # channels are being measured
            return
        self._now = batch = batch_of_call(module, args, kwargs)
        before, loop = self._still_open(), self._draws.decision.loop
        if not batch.tensors or (device := batch.device_in(module)) is None:
            return
        conditions = Conditions(
            (*(each.shapes for each in before), shapes_of(batch)),
            any(p.grad is not None for p in self._trained),
            loop.planned.autocast if loop.told else autocast_dtype_on(device),
        )
        if loop.planned.covers(conditions):
            return
        self._judge(conditions, before, batch)

    def _after(self, module: nn.Module, output: Any) -> None:
        """Remember a pass until a backward pass has gone through its graph, or the graph is gone."""
        batch, self._now = self._now, None
        if batch is None or output is None:
            return
        made = _Pass(batch)

        def returned(*_: Any) -> None:
            made.returned = True

        nodes = {t.grad_fn for t in tree_iter(output) if isinstance(t, Tensor) and t.grad_fn is not None}
        for node in nodes:
            notes: Any = node.metadata
            notes["trady_pass"] = made
            node.register_prehook(returned)
        if nodes:
            self._open.append(weakref.ref(made))

    def _still_open(self) -> list[_Pass]:
        passes = [found for reference in self._open if (found := reference()) is not None and not found.returned]
        self._open = [weakref.ref(found) for found in passes]
        return passes

    # -- what does not go by the plan ------------------------------------------------------------------

    def _judge(self, conditions: Conditions, before: list[_Pass], batch: Batch) -> None:
        draws, budget = self._draws, self._draws.decision.budget
        assert budget is not None
        drawn = draws.selection, draws.moment
        if self._fits[0] is None or any(a is not b for a, b in zip(self._fits[0], drawn, strict=True)):  # type: ignore[call-overload]
            self._fits = drawn, set()
        if any(known.covers(conditions) for known in self._fits[1]):
            return
        kind = _device_type(batch, self._armed.model)
        with apart(), torch.enable_grad(), torch.autocast(kind, enabled=False):
            batches = [*(each.batch for each in before), batch]
            found = self._case(conditions, batches)
            if found is None:
                return
            try:
                amount = draws.decision.step_amount(draws.moment, draws.selection, found)
            except TradyError:
                raise
            except Exception as error:  # the model takes another way here than on the example
                self._cannot_tell(batch, error)
                return
            if amount > budget.amount:
                self._exceeded(conditions, batches, found, amount)
        self._fits = (draws.selection, draws.moment), {*self._fits[1], conditions}

    def _case(self, conditions: Conditions, batches: list[Batch]) -> Case | None:
        if conditions not in self._cases:
            loop = self._draws.decision.loop
            if conditions == replace(loop.planned, accumulates=True):  # the planned step is simulated already
                self._cases[conditions] = self._draws.decision.peaks.cases[0].accumulating()
                return self._cases[conditions]
            try:
                found = loop.case(batches, conditions)
            except ModelError as error:
                self._cannot_tell(batches[-1], error)
                found = None
            self._cases[conditions] = found
        return self._cases[conditions]

    def _cannot_tell(self, batch: Batch, error: Exception) -> None:
        self._warn("trace", f"a forward pass on {batch.shapes} cannot be held against the budget: {error}")

    def _exceeded(self, conditions: Conditions, batches: list[Batch], found: Case, amount: int) -> None:
        decision, budget = self._draws.decision, self._draws.decision.budget
        assert budget is not None
        what, remedy = self._difference(conditions, batches)
        takes = f"{what}: the step would take {format_bytes(amount)} of the budget {budget}"
        if decision.over_budget == "warn":
            self._warn(remedy, f"{takes}. {remedy}")
            return
        if decision.over_budget == "refuse" or len(batches) > 1 or (_processes() > 1 and not self._planned(conditions)):
            raise StepTooLargeError(f"{takes}. {remedy}")
        allowing = decision.allowing(found)
        before = self._draws.selection
        try:
            moment = allowing.fit_to_budget(self._draws.moment)
            selection = allowing.draw(moment, self._draws.epoch, self._draws.count)
        except InfeasibleBudgetError as error:
            raise StepTooLargeError(f"{takes}, with no channel {format_bytes(error.least_amount)}. {remedy}") from None
        self._warn(
            remedy,
            f"{takes}. To stay inside it, {selection.count} channels train from now on, before it were {before.count}. "
            f"{remedy}",
        )
        self._adapt(allowing, moment, selection)

    def _adapt(self, decision: Decision, moment: Moment, selection: Selection) -> None:
        """Let other channels train; the gradients of those that stay are kept."""
        self._draws.decision, self._draws.moment = decision, moment
        self._armed.interceptor.recompute(moment.recomputation.segments)
        gradients = {id(p): p.grad for p in self._trained if p.grad is not None}
        for change in self._draws.apply(selection):
            keep_gradient(change, gradients.get(id(change.compact)))

    def _planned(self, conditions: Conditions) -> bool:
        planned = self._draws.decision.loop.planned
        return planned.covers(Conditions(conditions.calls, planned.accumulates, planned.autocast))

    def _difference(self, conditions: Conditions, batches: list[Batch]) -> tuple[str, str]:
        """Say in which way a step differs from the planned one, and what to do about it."""
        planned = self._draws.decision.loop.planned
        if len(conditions.calls) > len(planned.calls):
            return (
                f"this is forward pass {len(batches)} before a backward pass, {len(planned.calls)} planned",
                f"Run backward() after each pass, or plan for it: trady.prepare(..., calls_per_step={len(batches)})",
            )
        if not self._planned(conditions):
            return (
                f"this batch, {batches[-1].shapes}, is not covered by the one that was planned for",
                "Prepare with the largest batch that training will see, or cut batches into smaller parts",
            )
        if conditions.autocast != planned.autocast:
            return (
                f"this pass runs with autocast={conditions.autocast}, the plan with {planned.autocast}",
                "Call trady.prepare under the same torch.autocast",
            )
        return (
            "gradients of an earlier pass are still there",
            "Call optimizer.zero_grad() before the forward pass; where gradients are to add up, plan for it: "
            "trady.prepare(..., accumulates=True)",
        )

    def _warn(self, kind: str, text: str) -> None:
        """Say it once."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, TradyWarning, stacklevel=8)


def _device_type(batch: Batch, model: nn.Module) -> str:
    device = batch.device_in(model)
    return "cpu" if device is None else device.type


def _processes() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
