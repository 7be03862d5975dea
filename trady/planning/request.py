"""What is asked for, and how that becomes a decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trady.analysis.by_hand import Wish, frozen_by_hand
from trady.analysis.model_analysis import ModelAnalysis, analyse_model, find_recomputable, trace_modes
from trady.analysis.segments import NO_SEGMENTS
from trady.analysis.step_work import WorkCounter
from trady.errors import BudgetError, ModelError, RankingError
from trady.evidence.measures import needs_snapshot
from trady.model.batch import Batch
from trady.model.eager import unwrap_compiled
from trady.model.sharded import refuse_sharded, unwrap_parallel
from trady.ops.context import autocast_dtype_on, simulated_autocast
from trady.ops.smooth import FIDELITIES
from trady.planning.alternatives import alternatives
from trady.planning.budget import Budget, InfeasibleBudgetError, infeasible_budget, parse_budget
from trady.planning.conditions import Conditions, Loop, check_conditions, shapes_of
from trady.planning.decision import POOL_SHARE, Decision
from trady.planning.micro_batch import ENOUGH, MOST, check_micro_batch, chunk_sizes
from trady.planning.peaks import Peaks
from trady.planning.plan import Plan
from trady.planning.process_memory import measured
from trady.planning.recomputation import MODES, Planner
from trady.planning.reserve import Reserve, reserve_for
from trady.planning.scopes import PEAK
from trady.planning.spending import Moment
from trady.planning.step_flops import StepLimit, parse_step_flops
from trady.planning.traffic import check_ranks
from trady.policies import Policy, get_policy, needs_of
from trady.process.ranks import processes
from trady.ranking.priors import ranking_for
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.simulator import ExampleLoss

#: The budget of who names no amount.
AUTO = "auto"

#: An amount that was found is rounded up to these, so that it can be read: by a sixteenth at most.
_ROUND_UNITS = (1 << 30, 1 << 20, 1 << 10, 1)

#: A peak that everything fits in.
_BOUNDLESS = Budget(PEAK, 2**62)


@dataclass(frozen=True)
class Request:
    """What a user asks for, beside the model and its batch: the one list of options.

    :func:`trady.prepare` says what each is for. Words and budgets are checked here, wherever they were said.

    Raises:
        BudgetError: A budget that cannot be read, or a word that is not known.
        PolicyError: There is no such policy.

    """

    budget: str | int | Budget | None = None
    policy: str | Policy = "trady"
    ranking: LayerRanking | str | None = None
    head: str | Sequence[str] | None = "auto"
    seed: int = 0
    plan: Plan | None = None
    fuse: bool = True
    recompute: str = "auto"
    fidelity: str = "exact"
    micro_batch: int | str | None = None
    loss: Callable[[Any], Tensor] | None = None
    train: Wish | None = None
    freeze: Wish | None = None
    calls_per_step: int = 1
    accumulates: bool = False
    autocast: torch.dtype | None = None
    over_budget: str = "adapt"
    batches_ahead: int = 0
    max_step_flops: str | float | None = None
    ranks: int = 1

    def __post_init__(self) -> None:
        check_conditions(self.calls_per_step, self.over_budget, self.batches_ahead)
        for name, given, known in (("recompute", self.recompute, MODES), ("fidelity", self.fidelity, FIDELITIES)):
            if given not in known:
                raise BudgetError(f"{name}={given!r} is not known; type one of {', '.join(known)}")
        check_micro_batch(self.micro_batch)
        check_ranks(self.ranks)
        if self.budget is not None and self.budget != AUTO:
            object.__setattr__(self, "budget", parse_budget(self.budget))
        object.__setattr__(self, "max_step_flops", parse_step_flops(self.max_step_flops))
        get_policy(self.policy)

    # -- an earlier plan goes before ---------------------------------------------------------------------

    @property
    def limit(self) -> Budget | None:
        """What may be spent; ``None`` is no limit, or one that :meth:`resolved` is still to find."""
        if self.budget is None and self.plan is not None:
            return self.plan.budget
        return None if self.budget is None or self.budget == AUTO else parse_budget(self.budget)

    @property
    def rule(self) -> Policy:
        """What draws the channels."""
        if self.plan is not None and getattr(self.policy, "name", None) != self.plan.policy:
            return get_policy(self.plan.policy)
        return get_policy(self.policy)

    @property
    def step_limit(self) -> float | None:
        """What a step may take of a step of full fine-tuning."""
        if self.max_step_flops is None and self.plan is not None and self.plan.step is not None:
            return self.plan.step.limit
        return parse_step_flops(self.max_step_flops)

    def resolved(self, model: nn.Module, example: Batch | Any, *, optimizer: OptimizerMemory | None = None) -> Request:
        """Return the request with an amount where the budget is ``"auto"``: what an inference pass of a batch takes.

        So whatever can be used can be trained. Where a training step takes more at least, it is that.
        """
        if self.budget != AUTO:
            return self
        boundless = replace(self, budget=_BOUNDLESS, plan=None)
        decision = boundless.decide(model, example, optimizer=optimizer)
        amount = max(sum(decision.peaks.inference_bytes), decision.minimum_peak(decision.start))
        unit = next(unit for unit in _ROUND_UNITS if amount >= 16 * unit or unit == _ROUND_UNITS[-1])
        return replace(self, budget=Budget(PEAK, -(-amount // unit) * unit))

    def decide(
        self,
        model: nn.Module,
        example: Batch | Any,
        *,
        optimizer: OptimizerMemory | None = None,
        explain: bool = True,
    ) -> Decision:
        """Analyse the model and decide; nothing is changed yet.

        Args:
            model: The model.
            example: A full batch.
            optimizer: What the optimizer will take, as far as it is known.
            explain: Whether a refusal says what would take less, which has to be simulated.

        Raises:
            BudgetError: The budget is below the minimum.
            ModelError: The model cannot be traced, or has nothing to update.
            RankingError: The ranking is of another model.

        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}; trady fine-tunes torch.nn.Module objects")
        model = unwrap_parallel(model)
        refuse_sharded(model)
        if self.budget == AUTO:
            found = self.resolved(model, example, optimizer=optimizer)
            return found.decide(model, example, optimizer=optimizer, explain=explain)
        batch = Batch.of(example, model)
        limit = self.limit
        known = self if limit is None else replace(self, budget=measured(limit, model, batch))
        optimizer = replace(optimizer or OptimizerMemory(), averages=max(processes(), self.ranks) > 1)
        return known._decide_size(model, batch, optimizer, explain=explain)

    def _decide_size(
        self, model: nn.Module, batch: Batch, optimizer: OptimizerMemory | None, *, explain: bool
    ) -> Decision:
        """Decide for the largest chunks that the budget is possible with, or that leave enough of it to channels."""
        refused: InfeasibleBudgetError | None = None
        sizes = chunk_sizes(batch, self.micro_batch)
        possible: list[tuple[int, Decision]] = []
        for size in sizes:
            try:
                decision = self._decide(model, batch, size, optimizer)
                # A policy that trains everything may find only when it draws: too much.
                selection = decision.draw(decision.start, 0, 0)
            except InfeasibleBudgetError as error:
                refused = error
                continue
            possible.append((decision.table.weight_elements(selection), decision))
            if self.micro_batch != MOST or not decision.gains_by_smaller_chunks(selection):
                break
        if possible:
            enough = ENOUGH * max(trains for trains, _ in possible)
            return next(decision for trains, decision in possible if trains >= enough)
        assert refused is not None
        if not explain or not refused.budget.scope.bounds_peak:
            raise refused
        scope = refused.budget.scope
        less = alternatives(
            unwrap_compiled(model),
            batch if sizes[-1] is None else batch.chunk(0, sizes[-1]),
            self.recompute,
            lambda model, batch, recompute: self._minimum_bytes(model, batch, recompute, optimizer),
            scope.peak_of(refused.least_amount) or 0,
        )
        less = {what: scope.of_peak(minimum) for what, minimum in less.items()}
        raise infeasible_budget(refused.budget, refused.least_amount, less, why=refused.why) from None

    def _decide(self, given: nn.Module, batch: Batch, size: int | None, optimizer: OptimizerMemory | None) -> Decision:
        """Decide for chunks of ``size`` samples."""
        model = unwrap_compiled(given)
        full = size is None or size >= batch.samples
        chunk = batch if size is None or full else batch.chunk(0, size)
        head = self.head if self.plan is None else self.plan.head
        narrow = self.autocast or autocast_dtype_on(batch.device_in(model) or torch.device("meta"))
        with simulated_autocast(narrow):
            traces = trace_modes(model, chunk)
        frozen = frozen_by_hand(model, self.train, self.freeze)
        analysis = analyse_model(model, chunk, head=head, fuse=self.fuse, traces=traces, frozen=frozen)
        plain = {id(parameter) for parameter in analysis.head_parameters.values()}
        counter = WorkCounter(traces.training, analysis.table, dict(model.named_parameters()), plain)
        steps = StepLimit.of_layers(counter, self.step_limit, analysis.drawable, self.rule)
        analysis = replace(analysis, held=analysis.held | steps.early)
        if self.plan is not None and structure_digest(self.plan.table) != structure_digest(analysis.table):
            raise ModelError(
                f"the plan is for a {self.plan.model} with other layers than this {type(model).__name__}; "
                "make a new one with trady.plan"
            )
        recomputes = self.fuse and self.recompute != "none"
        with simulated_autocast(narrow):
            planner = (
                Planner(*find_recomputable(model, chunk, analysis, traces)) if recomputes else Planner(NO_SEGMENTS, 0)
            )
        calls, waiting = self.calls_per_step, (1 + self.batches_ahead) * batch.nbytes - chunk.nbytes
        planned = Conditions((shapes_of(chunk),) * calls, self.accumulates or not full, narrow)
        loss = None if self.loss is None else ExampleLoss(self.loss, batch.samples)
        told = self.autocast is not None
        loop = Loop(model, analysis, planned, self.fidelity, waiting, loss, told, self.batches_ahead, batch.nbytes)
        case = loop.case([chunk] * calls, planned)
        if self.limit is not None and self.limit.scope.in_bytes:
            analysis = replace(analysis, table=case.table)
        return self._settle(
            given,
            analysis,
            Peaks((case,), planner),
            optimizer or OptimizerMemory(),
            micro_batch=None if full else size,
            loop=loop,
            steps=steps,
        )

    def _settle(
        self,
        given: nn.Module,
        analysis: ModelAnalysis,
        peaks: Peaks,
        optimizer: OptimizerMemory,
        *,
        micro_batch: int | None,
        loop: Loop,
        steps: StepLimit,
    ) -> Decision:
        """Settle what channels are drawn from, and fit it to the budget."""
        limit, policy, table = self.limit, self.rule, analysis.table
        seed = self.seed if self.plan is None else self.plan.seed

        def reserve(pool: tuple[str, ...]) -> Reserve:
            return reserve_for(table, pool, policy, seed, in_bytes=limit is not None and limit.scope.in_bytes)

        pool, source, ranking = self._pool(analysis, reserve(analysis.drawable))
        decision = Decision(
            given,
            analysis,
            limit,
            policy,
            seed,
            source,
            Moment(
                pool,
                peaks.planner.everything if self.recompute != "none" else peaks.planner.nothing,
                optimizer,
                ranking,
                learns=source == "online",
            ),
            peaks,
            reserve(pool),
            loop,
            steps,
            self.recompute,
            self.fidelity,
            micro_batch,
            needs_snapshot(needs_of(policy)),
            self.over_budget,
        )
        return replace(decision, start=decision.fit_to_budget(decision.start, first=True))

    def _pool(self, analysis: ModelAnalysis, reserve: Reserve) -> tuple[tuple[str, ...], str, LayerRanking | None]:
        """The layers that channels are drawn from, where that comes from, and the ranking."""
        table = analysis.table
        if not self.rule.uses_ranking:
            return analysis.drawable, "none", None
        if self.plan is not None and self.plan.ranking not in ("online", "none"):
            return tuple(name for name in self.plan.pool if name not in analysis.held), "given", None
        ranking = ranking_for(table, self.ranking)
        if ranking is None and reserve.grows:  # learning takes more draws than bytes have room for
            if self.ranking == "online":
                raise RankingError(
                    "ranking='online' draws channels every few steps, and quantised layers keep each of them in "
                    "floating point: no budget in bytes has room for that. Measure a ranking (trady.rank), or type "
                    "ranking='structural' or an elements: budget"
                )
            ranking = ranking_for(table, "structural")
        if ranking is None:
            return analysis.drawable, "online", None
        return ranking.top(POOL_SHARE, analysis.held), ranking.source, ranking

    def _minimum_bytes(self, model: nn.Module, batch: Batch, recompute: str, optimizer: OptimizerMemory | None) -> int:
        request = replace(self, budget=_BOUNDLESS, recompute=recompute, plan=None, micro_batch=None)
        decision = request._decide(model, batch, None, optimizer)
        return decision.minimum_peak(decision.start, exact=False)
