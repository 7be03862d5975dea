"""Keeps a loop inside its budget: looks at every forward pass before it runs, and predicts steps that were not planned.

A step can differ from the planned one in the shapes of its batch, in how often the model is called before the backward
pass, in gradients of earlier passes that are still there, and in autocast. Whatever the plan covers costs a comparison
of shapes. Anything else is simulated once; if it does not fit, fewer channels train from then on.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.channels.selection import Selection
from trady.errors import ModelError, TradyError, TradyWarning
from trady.interception.armed import Armed
from trady.model.batch import Batch, batch_of_call
from trady.model.hooks import register_unwatched
from trady.model.untouched import apart
from trady.ops.context import autocast_dtype_on
from trady.planning.budget import InfeasibleBudgetError, StepTooLargeError
from trady.planning.conditions import Conditions, Shapes, shapes_of
from trady.planning.decision import Decision
from trady.planning.peaks import Case
from trady.planning.spending import Moment
from trady.process.ranks import processes
from trady.report.units import format_bytes
from trady.tuner.draws import Draws
from trady.tuner.gradients import keep_gradient
from trady.tuner.parts import of_batch_statistics
from trady.tuner.seen import Seen


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


#: A kind of step, and the bytes of a larger batch that wait meanwhile.
_Kind = tuple[Conditions, int]


@dataclass(eq=False)
class _Known:
    """Steps that are known to fit or not to fit with what trains at a moment."""

    drawn: tuple[Selection, Moment] | None = None
    fits: set[_Kind] = field(default_factory=set)
    exceeds: dict[_Kind, tuple[Case, int]] = field(default_factory=dict)

    def is_of(self, selection: Selection, moment: Moment) -> bool:
        return self.drawn is not None and self.drawn[0] is selection and self.drawn[1] is moment


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
        self._known = _Known()
        self._cases: dict[_Kind, Case | None] = {}
        self._inference: dict[Shapes, int] = {}
        self._autocast = draws.decision.loop.planned.autocast
        self._open: list[weakref.ref[_Pass]] = []
        self._now: Batch | None = None
        self._warned: set[str] = set()
        armed.on_forward.append(self._before)
        armed.on_output.append(self._after)

    # -- one forward pass ------------------------------------------------------------------------------

    def _inference_size(self, whole: Batch, size: int) -> int:
        draws = self._draws
        left = draws.decision.left_while_idle(draws.moment, draws.selection)
        while size > 1 and not math.isinf(left):
            part = whole.chunk(0, size)
            if self._inference_bytes_of(part) + whole.nbytes - part.nbytes <= left:
                break
            size = -(-size // 2)
        return size

    def _inference_bytes_of(self, batch: Batch) -> int:
        kind = shapes_of(batch)
        if kind not in self._inference:
            with simulating(batch, self._armed.model):
                try:
                    self._inference[kind] = self._draws.decision.loop.inference_bytes(batch)
                except Exception as error:  # it takes another way here than on the example
                    self._cannot_tell(batch, error)
                    self._inference[kind] = 0
        return self._inference[kind]

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
        self._autocast = conditions.autocast
        if not loop.planned.covers(conditions):
            self._judge(conditions, [*(each.batch for each in before), batch], loop.waiting_bytes)

    def part_size(self, whole: Batch) -> int | None:
        """Return the samples of the largest parts of a batch that fit as it trains now; ``None`` is all of them.

        While gradients are off, the parts are those of an inference pass.

        A batch that cannot be cut exactly is left as it is. Where not even one sample fits, fewer channels train from
        now on: before the first part, so that all parts have the gradients of the same channels.

        Raises:
            StepTooLargeError: Nothing fits.
        """
        decision = self._draws.decision
        loop, planned = decision.loop, decision.micro_batch
        once = self._draws.moment.optimizer.in_backward is not None
        unknown = (
            not whole.may_be_cut
            or not any(t.dim() for t in whole.tensors)
            or whole.device_in(self._armed.model) is None
        )
        trains = torch.is_grad_enabled()
        if (once and trains) or unknown or of_batch_statistics(self._armed.model) is not None:
            return planned
        size = whole.samples if planned is None else min(planned, whole.samples)
        if not trains:
            size = self._inference_size(whole, size)
            return None if size == whole.samples else size
        kept = any(p.grad is not None for p in self._trained)
        while True:
            part = whole.chunk(0, size)
            waiting = max((1 + loop.batches_ahead) * whole.nbytes - part.nbytes, loop.waiting_bytes)
            calls, adds_up = len(loop.planned.calls), size < whole.samples or kept
            conditions = Conditions((shapes_of(part),) * calls, adds_up or loop.planned.accumulates, self._autocast)
            if loop.planned.covers(conditions) and waiting <= loop.waiting_bytes:
                break
            if size == 1:
                self._judge(conditions, [part] * calls, waiting)
                break
            if self._over(conditions, [part] * calls, waiting) is None:
                break
            size = -(-size // 2)
        return None if size == whole.samples else size

    def _after(self, module: nn.Module, output: Any) -> None:
        """Remember a pass until a backward pass has gone through its graph, or the graph is gone."""
        batch, self._now = self._now, None
        if batch is None or output is None:
            return
        made = _Pass(batch)

        def returned(*_: Any) -> None:
            made.returned = True

        found = (t.grad_fn for t in tree_iter(output) if isinstance(t, Tensor))
        nodes = dict.fromkeys(node for node in found if node is not None)
        for node in nodes:
            notes: Any = node.metadata
            notes["trady_pass"] = made
            register_unwatched(node.register_prehook, returned)
        if nodes:
            self._open.append(weakref.ref(made))

    def _still_open(self) -> list[_Pass]:
        passes = [found for reference in self._open if (found := reference()) is not None and not found.returned]
        self._open = [weakref.ref(found) for found in passes]
        return passes

    # -- what does not go by the plan ------------------------------------------------------------------

    def _judge(self, conditions: Conditions, batches: list[Batch], waiting: int) -> None:
        if (over := self._over(conditions, batches, waiting)) is not None:
            with simulating(batches[-1], self._armed.model):
                self._exceeded(Seen(conditions, tuple(each.packed for each in batches), waiting), batches, *over)
            self._known_now().fits.add((conditions, waiting))

    def _over(self, conditions: Conditions, batches: list[Batch], waiting: int) -> tuple[Case, int] | None:
        """Return what a step of this kind takes, where that is more than the budget; what cannot be told is not."""
        draws, budget, known = self._draws, self._draws.decision.budget, self._known_now()
        assert budget is not None
        if any(kind.covers(conditions) and room >= waiting for kind, room in known.fits):
            return None
        for (kind, room), over in known.exceeds.items():
            if conditions.covers(kind) and waiting >= room:
                return over
        with simulating(batches[-1], self._armed.model):
            found = self._case(conditions, batches, waiting)
            if found is None:
                return None
            try:
                amount = draws.decision.step_amount(draws.moment, draws.selection, found)
            except TradyError:
                raise
            except Exception as error:  # the model takes another way here than on the example
                self._cannot_tell(batches[-1], error)
                return None
        if amount > budget.amount:
            known.exceeds[conditions, waiting] = found, amount
            return found, amount
        known.fits.add((conditions, waiting))
        return None

    def _known_now(self) -> _Known:
        """What is known of steps with what trains now."""
        if not self._known.is_of(self._draws.selection, self._draws.moment):
            self._known = _Known((self._draws.selection, self._draws.moment))
        return self._known

    def _case(self, conditions: Conditions, batches: list[Batch], waiting: int) -> Case | None:
        kind = conditions, waiting
        if kind not in self._cases:
            try:
                self._cases[kind] = self._draws.decision.case(batches, conditions, waiting)
            except ModelError as error:
                self._cannot_tell(batches[-1], error)
                self._cases[kind] = None
        return self._cases[kind]

    def _cannot_tell(self, batch: Batch, error: Exception) -> None:
        self._warn("trace", f"a forward pass on {batch.shapes} cannot be held against the budget: {error}")

    def _exceeded(self, seen: Seen, batches: list[Batch], found: Case, amount: int) -> None:
        decision, budget = self._draws.decision, self._draws.decision.budget
        assert budget is not None
        conditions = seen.conditions
        what, remedy = self._difference(conditions, batches)
        takes = f"{what}: the step would take {format_bytes(amount)} of the budget {budget}"
        if decision.over_budget == "warn":
            self._warn(remedy, f"{takes}. {remedy}")
            return
        # What was trained is kept to compare with: other channels would come on top of it.
        fixed = len(batches) > 1 or decision.needs_snapshot or (processes() > 1 and not self._planned(conditions))
        if decision.over_budget == "refuse" or fixed:
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
        self._draws.seen += (seen,)
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
            in_parts = ", or run it in parts that fit: for x, y, share in tuner.micro_batches(x, y): " + (
                "(loss(model(x), y) * share).backward()"
            )
            alone = batches[-1].samples == 1
            return (
                f"this batch, {batches[-1].shapes}, is not covered by the one that was planned for",
                "Prepare with the largest batch that training will see" + ("" if alone else in_parts),
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


@contextmanager
def simulating(batch: Batch, model: nn.Module) -> Iterator[None]:
    """Context for simulations in front of a forward pass: the loop's own modes are off."""
    device = batch.device_in(model)
    kind = "cpu" if device is None else device.type
    with apart(), torch.enable_grad(), torch.autocast(kind, enabled=False):
        yield
