"""What a step takes of the operations of full fine-tuning, and a limit to that: counted, so the same on every machine.

The multiply-adds of weight layers and matrix products are known before anything runs (:mod:`trady.analysis.step_work`).
How long a processor takes for them depends on the layers: docs/budgets.md has both side by side.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trady.analysis.step_work import StepWork, WorkCounter
from trady.channels.selection import Selection
from trady.errors import BudgetError, PolicyError
from trady.planning.recomputation import Recomputation
from trady.policies import Policy
from trady.policies.base import all_or_nothing, names_layers
from trady.records.schema import Natural

_SHARE = re.compile(r"\+?(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>[x×%]?)", re.IGNORECASE)

#: No step takes as much, whatever it recomputes.
_MOST = 10.0


def parse_step_flops(given: object) -> float | None:
    """Read what a step may take of the operations of a step of full fine-tuning.

    Args:
        given: ``"0.6x"``, ``"60%"`` or ``0.6``; ``None`` is no limit.

    Raises:
        BudgetError: It is something else; the message says what to type.

    """
    if given is None:
        return None
    match = _SHARE.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is None and (not isinstance(given, (int, float)) or isinstance(given, bool)):
        raise _refusal(given, "cannot be read")
    share = float(given if match is None else match["number"])  # type: ignore[arg-type]
    if match is not None and match["unit"] == "%":
        share /= 100
    if not math.isfinite(share):
        raise _refusal(given, "is not finite")
    if share <= 0:
        raise _refusal(given, "is not more than zero")
    if share > _MOST:
        raise _refusal(given, "is more than any step takes")
    return share


def _refusal(given: object, problem: str) -> BudgetError:
    return BudgetError(
        f"max_step_flops={given!r} {problem}; it is a share of the operations of a step of full fine-tuning: type e.g. "
        'max_step_flops="0.6x", or "60%"'
    )


@dataclass(frozen=True)
class StepFlops:
    """Multiply-adds of a step's forward and backward pass over the example; a multiply-add is two FLOPs.

    Attributes:
        forward: Of the forward pass.
        input_gradients: Of gradients with respect to activations.
        weight_gradients: Of gradients with respect to weights.
        recomputed: Of what the backward pass computes a second time, at most.
        full: Of a step of full fine-tuning that recomputes nothing.
        stops_at: The layer that the backward pass ends at: the first one that trains; empty if none does.
        passed: Layers that it goes through, that one included.
        layers: Layers that it goes through in full fine-tuning.
        limit: What a step may take of ``full``; ``None`` is no limit.
    """

    forward: Natural
    input_gradients: Natural
    weight_gradients: Natural
    recomputed: Natural
    full: Natural
    stops_at: str
    passed: Natural
    layers: Natural
    limit: float | None = None

    @property
    def total(self) -> int:
        """Multiply-adds of the step."""
        return self.forward + self.input_gradients + self.weight_gradients + self.recomputed

    @property
    def over_full(self) -> float:
        """Those of the step over those of full fine-tuning."""
        return self.total / max(self.full, 1)

    def facts(self) -> Iterable[tuple[str, str]]:
        """What a plan says of it for people: names and values."""
        if self.stops_at:
            yield "backward stops at", f"{self.stops_at}: {self.passed} of {self.layers} layers are passed"
        limit = "" if self.limit is None else f"; up to {self.limit:g}x is allowed"
        yield "step", f"{self.over_full:.2f}x the operations of full fine-tuning{limit}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, and the share of full fine-tuning."""
        return {**asdict(self), "over_full": self.over_full}


@dataclass(frozen=True, eq=False)
class StepLimit:
    """Counts steps of one model, and says which layers a limit leaves.

    Attributes:
        counter: Counts their work.
        limit: What a step may take of one of full fine-tuning; ``None`` is no limit.
        early: Layers that no step may reach: the way back to them alone takes more than the limit.
    """

    counter: WorkCounter
    limit: float | None = None
    early: frozenset[str] = frozenset()

    @classmethod
    def of_layers(cls, counter: WorkCounter, limit: float | None, layers: tuple[str, ...], policy: Policy) -> StepLimit:
        """Find the layers that the limit leaves.

        Args:
            counter: Counts the work of steps.
            limit: Of a step of full fine-tuning.
            layers: Layers that channels may be drawn from, in order of execution.
            policy: One that is given its layers keeps them all, and is refused if these take more.

        """
        if limit is None or names_layers(policy):
            return cls(counter, limit)
        return cls(counter, limit, frozenset(layers[: _first_within(limit, counter, layers, counter.reaching)]))

    def of(self, selection: Selection, recomputation: Recomputation) -> StepFlops:
        """Count a step in which these channels train."""
        work = self.counter.of(selection, recomputation.segments.training)
        counted = work.forward, work.input_gradients, work.weight_gradients, work.recomputed
        return StepFlops(
            *counted, self.counter.full.total, work.stops_at, work.passed, self.counter.full.passed, self.limit
        )

    def exceeded(self, selection: Selection, recomputation: Recomputation) -> bool:
        """Whether a step in which these channels train takes more than the limit."""
        return self.limit is not None and self.of(selection, recomputation).over_full > self.limit

    def too_early(self, selection: Selection, recomputation: Recomputation, layers: tuple[str, ...]) -> frozenset[str]:
        """Return the layers, all in front of some place, that a selection has to lose to come within the limit.

        Args:
            selection: Takes more than the limit.
            recomputation: What the backward pass recomputes.
            layers: Layers that it was drawn from, in order of execution.

        """
        assert self.limit is not None

        def work(left: tuple[str, ...]) -> StepWork:
            return self.counter.of(selection.renamed({name: name for name in left}), recomputation.segments.training)

        return frozenset(layers[: _first_within(self.limit, self.counter, layers, work)])

    def check_minimum(self, policy: Policy, layers: tuple[str, ...], recomputation: Recomputation) -> None:
        """Refuse a limit that leaves no layer to draw from.

        Args:
            policy: Draws the channels.
            layers: Layers that may train, as far as the limit goes.
            recomputation: What the backward pass recomputes.

        Raises:
            BudgetError: A step in which no layer but the last one trains takes more; the message names what it takes.

        """
        if self.limit is None or names_layers(policy):
            return
        last = () if policy.name == "head" else layers[-1:]
        least = self.of(
            Selection({n: np.arange(self.counter.channels(n) if all_or_nothing(policy) else 1) for n in last}),
            recomputation,
        )
        if least.over_full > self.limit:
            back = f" and the way back to {least.stops_at}" if least.stops_at else ""
            less = ', or recompute="none", or a budget in which less is recomputed' if least.recomputed else ""
            raise BudgetError(
                f"max_step_flops={self.limit:g}x is below the minimum, a forward pass{back}: type "
                f'max_step_flops="{_rounded_up(least.over_full)}"{less}'
            )

    def refusal(self, policy: Policy, selection: Selection, recomputation: Recomputation) -> PolicyError:
        """Return the error for a policy that is given its layers, and exceeds the limit with them."""
        least = _rounded_up(self.of(selection, recomputation).over_full)
        return PolicyError(
            f"policy {policy.name!r} trains the layers that it is given, and a step that reaches them takes {least} of "
            f'a full one, more than max_step_flops={self.limit:g}x: type max_step_flops="{least}", or give it later '
            "layers"
        )


def _first_within(
    limit: float, counter: WorkCounter, layers: tuple[str, ...], work: Callable[[tuple[str, ...]], StepWork]
) -> int:
    """Count the layers to leave out in front, so that a step takes no more than the limit; fewer layers take less."""
    most = limit * counter.full.total
    return bisect_left(range(len(layers)), True, key=lambda first: work(layers[first:]).total <= most)


def _rounded_up(share: float) -> str:
    """With two decimals, never less than given."""
    return f"{math.ceil(share * 100 - 1e-9) / 100:g}x"
