"""Budget, policy and ranking together: which channels train when, and what the plan says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from trady.analysis.model_analysis import ModelAnalysis
from trady.channels.cost import Cost, Sparsity
from trady.channels.partition import cut
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.errors import BudgetError, ModelError
from trady.model.batch import Batch
from trady.model.eager import unwrap_compiled
from trady.planning.budget import Budget, infeasible_budget
from trady.planning.conditions import Conditions, Loop, costlier
from trady.planning.drawing import Drawing
from trady.planning.peaks import Case, Peaks
from trady.planning.phases import predicted_phases
from trady.planning.plan import Plan
from trady.planning.recomputation import Recomputation
from trady.planning.reserve import Reserve
from trady.planning.scopes import PEAK, BudgetScope
from trady.planning.scopes.unlimited import UNLIMITED
from trady.planning.spending import Moment, Spending
from trady.planning.step_flops import StepLimit
from trady.policies import Needs, Policy, needs_of
from trady.ranking.online import OnlineRanking
from trady.simulation.optimizer_memory import Form, OptimizerMemory
from trady.simulation.timeline import compact_forms

#: The pool holds the layers that carry this share of the cumulated layer RGN (arXiv 2510.19675, section 4).
POOL_SHARE = 0.97

#: Epochs whose draws a plan averages over, and the most channels for which that takes next to no time.
EPOCHS_LOOKED_AT, MANY_CHANNELS = 20, 200_000

#: What a step may take, without weights and batch, over an inference pass, where the budget leaves it open.
PEAK_OVER_INFERENCE = 1.5

#: Optimizer steps between two draws while the ranking is being learnt.
STEPS_A_DRAW = 2


@dataclass(frozen=True, eq=False)
class Decision:
    """What was decided about a model on a batch, before anything trains. Made by :meth:`Request.decide`.

    What training changes is a :class:`Moment`; the tuner keeps the one of now and passes it in.

    Attributes:
        model: The model that was given, maybe compiled.
        analysis: What is known of it.
        budget: What may be spent; ``None`` is no limit.
        policy: Draws the channels.
        seed: Seed of the draws.
        source: Where the pool comes from (:attr:`Plan.ranking`).
        start: The moment before the first draw.
        peaks: Simulates steps, and chooses what is recomputed.
        reserve: For the float channels of quantised layers.
        loop: Predicts steps that differ from those of the example.
        recompute: What was asked for (:data:`trady.planning.recomputation.MODES`).
        fidelity: How exactly smooth activations that are kept are differentiated.
        micro_batch: Samples that the model works on at once; ``None`` is the full batch.
        needs_snapshot: Whether the weights that train are kept to compare with an epoch ago.
        over_budget: What happens when a step would take more than the budget
            (:data:`trady.planning.conditions.OVER_BUDGET`).
        steps: Counts what a step takes of the operations of full fine-tuning, and what it may.
    """

    model: nn.Module
    analysis: ModelAnalysis
    budget: Budget | None
    policy: Policy
    seed: int
    source: str
    start: Moment
    peaks: Peaks
    reserve: Reserve
    loop: Loop
    steps: StepLimit
    recompute: str = "auto"
    fidelity: str = "exact"
    micro_batch: int | None = None
    needs_snapshot: bool = False
    over_budget: str = "adapt"

    @property
    def table(self) -> ChannelTable:
        """Every layer that can be updated by channel."""
        return self.analysis.table

    @property
    def needs(self) -> Needs:
        """What the policy wants measured."""
        return needs_of(self.policy)

    @property
    def options(self) -> str:
        """What the policy was made with, and what limits its layers, as text."""
        limit = "" if self.steps.limit is None else f" max_step_flops={self.steps.limit:g}x"
        return f"{getattr(self.policy, 'options', '')}{limit}".strip()

    @property
    def _frozen_by_hand(self) -> frozenset[str]:
        return self.analysis.held - self.steps.early

    @property
    def scope(self) -> BudgetScope:
        """What the budget bounds."""
        return UNLIMITED if self.budget is None else self.budget.scope

    def check_something_trains(self) -> None:
        """Refuse to train nothing.

        Raises:
            ModelError: The policy trains the head alone, and there is none.

        """
        if self.policy.name == "head" and not self.analysis.head:
            raise ModelError(
                "policy 'head' trains the head alone, and this model has no head: its last layer is a language "
                "model's, tied to another or stored quantised, or head= is empty; name modules as head=..., or take "
                "another policy"
            )

    def spending(self, moment: Moment) -> Spending:
        """Return what tells how much selections take at a moment."""
        copies = moment.optimizer.copies + self.needs_snapshot
        head = self.analysis.head_parameters.values()
        return Spending(
            self.table,
            self.policy,
            self.seed,
            self.peaks,
            self.reserve,
            moment,
            head=tuple(Form.of(p.shape, p.element_size()) for p in head),
            needs_snapshot=self.needs_snapshot,
            prices=self.scope.prices(self.table, copies),
            priced_draws=self.scope.priced_draws(self.reserve.draws),
            held=self.analysis.held,
        )

    # -- does it fit? --------------------------------------------------------------------------------

    def fit_to_budget(self, moment: Moment, *, first: bool = False) -> Moment:
        """Choose what is recomputed, so that the budget is kept.

        Args:
            moment: With what the optimizer takes.
            first: Whether nothing was chosen yet. Later the choice changes with the optimizer only where the budget
                bounds the peak.

        Raises:
            BudgetError: Not even the smallest selection fits, or the shortest step; the message names the minimum.

        """
        moment = self._fitting(moment, first=first)
        layers = tuple(name for name in self.table.names if name not in self._frozen_by_hand)
        self.steps.check_minimum(self.policy, layers, moment.recomputation)
        return moment

    def _fitting(self, moment: Moment, *, first: bool) -> Moment:
        if self.budget is None:
            if self.policy.name not in ("head", "full"):
                examples = 'budget="300 MiB", "update:1 MiB" or "elements:27946"'
                raise BudgetError(f"policy {self.policy.name!r} needs a budget: type {examples}")
            return moment
        spending = self.spending(moment)
        if self.recompute == "auto" and self.peaks.planner.has_choice and (first or self.scope.bounds_peak):
            spending = spending.with_recomputation(self._recomputation(spending))
        if spending.moment.pool and self.policy.name != "head":
            minimum = self.scope.minimum(spending)
            if self.budget.amount < minimum:
                raise infeasible_budget(self.budget, self._least(spending, self.scope, minimum))
        return spending.moment

    def _recomputation(self, spending: Spending) -> Recomputation:
        """Recompute as little as a peak budget allows; else what takes the peak near to that of inference."""
        assert self.budget is not None
        if self.scope.bounds_peak:
            choice = spending.recomputing(self.budget.peak_bytes or 0)
            trains = self._drawing(spending.with_recomputation(choice), self.scope).trains_within(self.budget.amount)
            return choice if trains else spending.recomputing(0)
        resident, working = self.peaks.inference_bytes
        near_inference = resident + int(PEAK_OVER_INFERENCE * working)
        return spending.recomputing(near_inference, optimizer=OptimizerMemory(), capacity=self.budget.amount)

    def minimum_peak(self, moment: Moment, *, exact: bool = True) -> int:
        """The minimum peak budget that a step is possible in, with as much recomputed as helps."""
        spending = self.spending(moment)
        if self.recompute == "auto" and self.peaks.planner.has_choice:
            spending = spending.with_recomputation(spending.recomputing(0))
        if spending.all_or_nothing:
            return spending.peak(spending.useful(None))
        minimum = spending.minimum_peak()
        return self._least(spending, PEAK, minimum) if exact else minimum

    def _least(self, spending: Spending, scope: BudgetScope, minimum: int) -> int:
        """Return from what amount on something trains: from the minimum on, where the head does."""
        drawing = self._drawing(spending, scope)
        return (drawing.least(minimum - 1) or minimum) if drawing.needs_channels else minimum

    def _drawing(self, spending: Spending, scope: BudgetScope) -> Drawing:
        return Drawing(spending, scope, self.budget, self.steps, bool(self.analysis.head_parameters))

    def has_room(self, moment: Moment, selection: Selection, floats: Selection) -> bool:
        """Whether ``selection`` fits in a budget of bytes beside the channels that are kept in floating point."""
        if self.budget is None or not self.reserve.grows:
            return True
        kept = self.table.float_bytes(selection | floats)
        return self.scope.has_room(self.spending(moment), selection, kept, self.budget.amount)

    def of_steps(self, case: Case) -> Decision:
        """The same for steps of this case alone."""
        peaks, analysis = Peaks((case,), self.peaks.planner), replace(self.analysis, table=case.table)
        return replace(self, peaks=peaks, analysis=analysis)

    def step_amount(self, moment: Moment, selection: Selection, case: Case) -> int:
        """What a step of this case takes of the budget."""
        return self.scope.step_amount(self.of_steps(case).spending(moment), selection)

    def room(self, moment: Moment, trained: Selection, batch: Batch) -> float:
        """Bytes that the budget leaves beside an inference pass of the plain model on a batch, while nothing trains.

        Args:
            moment: The moment.
            trained: Channels that train, which are kept in compact parameters, with their state and copies.
            batch: The batch.
        """
        left = self.left_while_idle(moment, trained)
        return left if math.isinf(left) else left - self.loop.inference_bytes(batch)

    def left_while_idle(self, moment: Moment, trained: Selection) -> float:
        """Bytes that a budget leaves for weights, batches and passes beside what trains and the optimizer's state."""
        peak = None if self.budget is None else self.budget.peak_bytes
        if peak is None:
            return math.inf
        compact = sum(form.whole for form in compact_forms(self.table, trained))
        return peak - self.spending(moment).kept_bytes(trained, with_head=True) - compact

    def case(self, batches: Sequence[Batch], conditions: Conditions, waiting: int) -> Case:
        """Return steps that differ from those of the example.

        Args:
            batches: What the forward passes get.
            conditions: The same in shapes.
            waiting: Bytes of a larger batch that wait meanwhile.

        Raises:
            ModelError: The model cannot be traced on a batch.
        """
        planned = replace(self.loop.planned, accumulates=True)
        if (conditions, waiting) == (planned, self.loop.waiting_bytes):  # it is simulated already
            return self.peaks.cases[0].accumulating()
        return replace(self.loop, waiting_bytes=waiting).case(batches, conditions)

    def allowing(self, case: Case) -> Decision:
        """Return the decision whose draws leave room for steps of this case too."""
        if self.scope.bounds_peak:
            return replace(self, peaks=self.peaks.also(case))
        return replace(self, analysis=replace(self.analysis, table=costlier(self.table, case.table)))

    # -- draws ---------------------------------------------------------------------------------------

    def draw(self, moment: Moment, epoch: int, redraw: int) -> Selection:
        """Draw the channels of an epoch: a pure function of seed, epoch, redraw and moment.

        Raises:
            BudgetError: The policy's selection is never as small as the budget, or empty where nothing else trains.
            PolicyError: It is empty whatever the budget is, or has layers too far back for ``max_step_flops``.

        """
        return self._drawing(self.spending(moment), self.scope).draw(epoch, redraw)

    def gains_by_smaller_chunks(self, selection: Selection) -> bool:
        """Whether more could train than a draw at the start, if the batch took less of the budget."""
        drawn = sum(map(len, selection.channels.values()))
        pool = sum(layer.channels for layer in self.table if layer.name in self.start.pool)
        return self.scope.in_bytes and (bool(selection.outputs) or drawn < pool)

    def cost(self, moment: Moment, selection: Selection) -> Cost:
        """Account for a selection."""
        return self.spending(moment).cost(selection)

    def online_ranking(self) -> OnlineRanking:
        """Return a ranking to be learnt."""
        amount = 0 if self.budget is None else self.budget.amount
        fits = self.scope.drawable(self.spending(self.start), amount)
        drawable = [name for name in fits if name not in self.analysis.held]
        return OnlineRanking(self.table, drawable=drawable, share=POOL_SHARE, window=8 * STEPS_A_DRAW)

    def sweeps(self, moment: Moment, trained: Selection, numbers: int = 0) -> tuple[Selection, ...]:
        """Cut all channels into selections whose gradients can be had inside the budget.

        Args:
            moment: The moment.
            trained: The channels that train; the optimizer's state of them stays alive meanwhile.
            numbers: Numbers that are kept of a channel, where these are more than the weights that it has.

        Raises:
            BudgetError: Not one channel fits beside that state.

        """
        spending = self.spending(moment)
        kept = self.scope.kept_while_measuring(spending, trained) + self.reserve.reserved(trained)
        table = _with_weights(self.table, numbers)

        def taken(selection: Selection) -> int:
            return self.scope.measuring(spending, selection, kept, table)

        return sweeps_within(self.table, taken, self.budget)

    # -- what the plan says --------------------------------------------------------------------------

    def plan(self, moment: Moment, epoch: int = 0) -> Plan:
        """Describe the decision, with the draw of an epoch."""
        selection = self.draw(moment, epoch, 0)
        spending = self.spending(moment)
        peak = self.scope.bounds_peak
        predicted = spending.peak_parts(selection) if peak else {}
        step_bytes = sum(predicted.values())
        return Plan(
            model=type(unwrap_compiled(self.model)).__name__,
            budget=self.budget,
            policy=self.policy.name,
            seed=self.seed,
            table=self.table,
            pool=moment.pool,
            ranking=self.source,
            measured_on="" if moment.ranking is None else moment.ranking.measured_on,
            head=self.analysis.head,
            head_parameters=sum(p.numel() for p in self.analysis.head_parameters.values()),
            selection=selection,
            cost=spending.cost(selection),
            predicted_peak_bytes=step_bytes if peak else None,
            predicted_phases=self.phases(moment, selection, step_bytes) if peak else {},
            least_peak_bytes=spending.timeline.least_bytes if peak else None,
            recomputed=moment.recomputation.names,
            recomputable=moment.recomputation.found,
            recomputed_share=moment.recomputation.share_of_work,
            fidelity=self.fidelity,
            sparsity=None if peak else self._mean_sparsity(moment, selection, epoch),
            predicted_parts=predicted,
            micro_batch=self.micro_batch,
            read_ahead_bytes=self.loop.read_ahead_bytes,
            needs=self.needs.kinds,
            needs_each_epoch=self.needs.each_epoch,
            observed=not spending.lacks_evidence,
            held=tuple(name for name in self.table.names if name in self._frozen_by_hand),
            step=self.steps.of(selection, moment.recomputation),
        )

    def phases(self, moment: Moment, selection: Selection, step_bytes: int) -> dict[str, int]:
        """Predict the peak of each phase, in bytes; a step's is known."""
        waiting = self.loop.waiting_bytes
        return predicted_phases(self.spending(moment), self.analysis, waiting, selection, step_bytes)

    def _mean_sparsity(self, moment: Moment, selection: Selection, epoch: int) -> Sparsity | None:
        """Look at the draws of further epochs too, where a draw costs next to nothing."""
        spending = self.spending(moment)
        if spending.all_or_nothing or self.table.channel_count > MANY_CHANNELS:
            return None
        drawn = [selection, *(self.draw(moment, e, 0) for e in range(epoch + 1, epoch + EPOCHS_LOOKED_AT))]
        return Sparsity.of([spending.cost(each, 0) for each in drawn])


def sweeps_within(
    table: ChannelTable, taken: Callable[[Selection], int], budget: Budget | None
) -> tuple[Selection, ...]:
    """Cut all channels into selections that each fit.

    Args:
        table: The layers.
        taken: What a selection takes.
        budget: What may be spent; ``None`` is no limit.

    Raises:
        BudgetError: Not one channel fits.

    """
    amount = math.inf if budget is None else budget.amount
    selections = tuple(cut(table, lambda selection: taken(selection) <= amount))
    if budget is not None and not selections and table.layers:
        one = (Selection({layer.name: np.zeros(1, dtype=np.int64)}) for layer in table)
        raise infeasible_budget(budget, min(map(taken, one)))
    return selections


def _with_weights(table: ChannelTable, minimum: int) -> ChannelTable:
    """The table as if no channel had fewer weight elements than ``minimum``."""
    layers = (replace(layer, weight_elements=max(layer.weight_elements, minimum)) for layer in table)
    return replace(table, layers=tuple(layers)) if minimum else table
