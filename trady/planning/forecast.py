"""What budgets would buy: peaks over shares of channels, and plans over budgets and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from trady.channels.selection import Selection
from trady.planning.budget import Budget, InfeasibleBudgetError, parse_budget
from trady.planning.decision import Decision
from trady.planning.plan import Plan
from trady.planning.request import Request
from trady.planning.traffic import StepTraffic, step_traffic
from trady.simulation.optimizer_memory import OptimizerMemory

#: Shares of the channels of every layer.
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 1.0)


@dataclass(frozen=True)
class Point:
    """The peak of a step in which a share of the channels of every layer of the pool trains.

    Attributes:
        share: Of the input channels.
        channels: As many are they.
        kept_peak_bytes: With nothing recomputed.
        recomputed_peak_bytes: With all segments recomputed that are worth it; the same if there are none.
    """

    share: float
    channels: int
    kept_peak_bytes: int
    recomputed_peak_bytes: int


@dataclass(frozen=True)
class Forecast:
    """A plan with what lies around it.

    Attributes:
        plan: The plan, with its predicted peak.
        least_budget_bytes: The minimum ``peak:`` budget.
        curve: Peaks over shares of channels; empty where they were not asked for.
        traffic: What the processes of a training send each other; ``None`` for one.
    """

    plan: Plan
    least_budget_bytes: int
    curve: tuple[Point, ...] = ()
    traffic: StepTraffic | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything; :meth:`trady.Plan.from_json` reads the plan in it."""
        return {
            **self.plan.to_json(),
            "least_budget_bytes": self.least_budget_bytes,
            "curve": [asdict(point) for point in self.curve],
            **({} if self.traffic is None else {"traffic": self.traffic.to_json()}),
        }


@dataclass(frozen=True)
class Cell:
    """A budget and a batch size.

    Attributes:
        budget: As text.
        batch_size: Samples a step.
        possible: Whether a step is possible in it.
        channels: Input channels that train.
        channel_share: Of all input channels.
        predicted_peak_bytes: Of a step, weights included; where it is impossible, the minimum budget.
        recomputed_share: Multiply-adds executed a second time, over those of a forward pass, at most.
        micro_batch: Samples that the model works on at once; ``None`` is the whole batch.
    """

    budget: str
    batch_size: int
    possible: bool
    channels: int
    channel_share: float
    predicted_peak_bytes: int
    recomputed_share: float
    micro_batch: int | None = None


def forecast(
    model: nn.Module,
    example: Any,
    request: Request,
    *,
    shares: Sequence[float] = (),
    optimizer: OptimizerMemory | None = None,
) -> Forecast:
    """Plan, and predict the peak under any kind of budget.

    Args:
        model: The model; only read.
        example: One batch as training will see it.
        request: What is asked for.
        shares: Shares of channels to predict the peak of.
        optimizer: What the optimizer takes; by default that of plain SGD.

    Raises:
        BudgetError: The budget cannot be read or is below the minimum.

    """
    decision = request.decide(model, example, optimizer=optimizer)
    points = tuple(share_point(decision, share) for share in shares)
    plan, traffic = _with_peak(decision), None
    if request.ranks > 1:
        head = decision.analysis.head_parameters.values()
        traffic = step_traffic(plan.table, plan.selection, head, decision.model, request.ranks)
    return Forecast(plan, decision.minimum_peak(decision.start), points, traffic)


def sweep(
    model: nn.Module,
    request: Request,
    budgets: Iterable[str | int | Budget],
    batches: Iterable[tuple[int, Any]],
    done: Callable[[], object] = lambda: None,
    optimizer: OptimizerMemory | None = None,
) -> list[Cell]:
    """Plan under several budgets with several batches.

    Args:
        model: The model; only read.
        request: What is asked for, but for the budget.
        budgets: The budgets.
        batches: Batch sizes, and an example of each.
        done: Called after each plan.
        optimizer: What the optimizer takes; by default that of plain SGD.

    """
    asked = [parse_budget(budget) for budget in budgets]
    cells = []
    for samples, example in batches:
        for budget in asked:
            cells.append(_cell(model, replace(request, budget=budget), samples, example, optimizer))
            done()
    return cells


def _cell(model: nn.Module, request: Request, samples: int, example: Any, optimizer: OptimizerMemory | None) -> Cell:
    try:
        decision = request.decide(model, example, optimizer=optimizer, explain=False)
    except InfeasibleBudgetError as error:
        return Cell(str(error.budget), samples, False, 0, 0.0, error.least_amount, 0.0)
    plan = _with_peak(decision)
    assert plan.predicted_peak_bytes is not None
    return Cell(
        budget=str(plan.budget),
        batch_size=samples,
        possible=True,
        channels=plan.cost.channels,
        channel_share=plan.cost.channels / max(plan.table.channel_count, 1),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        recomputed_share=plan.recomputed_share,
        micro_batch=plan.micro_batch,
    )


def _with_peak(decision: Decision) -> Plan:
    plan = decision.plan(decision.start)
    if decision.scope.bounds_peak:
        return plan
    parts = decision.spending(decision.start).peak_parts(plan.selection)
    peak = sum(parts.values())
    phases = decision.phases(decision.start, plan.selection, peak)
    return replace(plan, predicted_parts=parts, predicted_peak_bytes=peak, predicted_phases=phases)


def share_point(decision: Decision, share: float) -> Point:
    """Predict the peak of a step in which this share of the channels of every layer of the pool trains."""
    counts = {name: round(share * decision.table[name].channels) for name in decision.start.pool}
    least = 1 if share > 0 else 0
    selection = Selection(
        {name: np.arange(max(count, least), dtype=np.int64) for name, count in counts.items() if count or least}
    )
    spending, planner = decision.spending(decision.start), decision.peaks.planner
    kept = sum(spending.peak_parts(selection, planner.nothing).values())
    recomputed = sum(spending.peak_parts(selection, planner.everything).values()) if planner.has_choice else kept
    return Point(share, selection.count, kept, recomputed)
