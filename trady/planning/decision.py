"""Budget, policy and ranking together: which channels train when, and what the plan says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from trady.analysis.model_analysis import ModelAnalysis
from trady.channels.cost import Cost, Sparsity, cost_of
from trady.channels.partition import cut
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.errors import BudgetError, RankingError
from trady.evidence.measures import needs_snapshot
from trady.model.batch import meta_batch
from trady.planning.budget import Budget, Scope, infeasible_budget
from trady.planning.plan import Plan
from trady.planning.recomputation import Planner, Recomputation
from trady.planning.reserve import Reserve, reserve_for
from trady.planning.rules import Rules
from trady.policies import Draw, Evidence, draw_selection, needs_of, typical_selection
from trady.ranking.online import OnlineRanking
from trady.ranking.priors import ranking_for
from trady.ranking.ranking import LayerRanking
from trady.simulation.optimizer_memory import Form, OptimizerMemory
from trady.simulation.simulator import Simulator
from trady.simulation.timeline import NORM_BYTES, Timeline, compact_forms

#: The pool holds the layers that carry this share of the cumulated layer RGN (arXiv 2510.19675, section 4).
POOL_SHARE = 0.97

#: As many of all channels (by elements) are to fit before anything is kept that could be computed anew.
USEFUL_SHARE = 0.02

#: Epochs whose draws a plan averages over.
EPOCHS_LOOKED_AT = 20

MANY_CHANNELS = 200_000

#: What a step may take, without weights and batch, over an inference pass, where the budget leaves it open.
PEAK_OVER_INFERENCE = 1.5

#: A number of steps, as torch.optim keeps it.
_COUNTER_BYTES = 4

#: Optimizer steps between two draws while the ranking is being learnt.
STEPS_A_DRAW = 2


class Decision:
    """Budget, policy and ranking together: which channels train at which epoch and redraw.

    Args:
        model: The model; only read.
        example: What the model works on at once.
        analysis: What is known of the model.
        rules: What is asked for.
        planner: Chooses what is computed anew.
        waiting_bytes: Bytes of a larger batch that wait meanwhile.
        optimizer: What the optimizer will take, as far as it is known.

    Attributes:
        pool: Layers that channels are drawn from.
        online: The ranking being learnt; ``None`` when one is given, settled or not needed.
        optimizer: What the optimizer takes.
        recomputation: What is computed anew in the backward pass.
        fidelity: How exactly smooth activations that are kept are differentiated.
        micro_batch: Samples that the model works on at once; ``None`` is the whole batch.
        needs: What the policy wants measured.
        needs_snapshot: Whether the weights that train are kept to compare with an epoch ago.
        evidence: What was measured; ``None`` until then, and draws are typical ones, for plans.
        options: What the policy was made with, as text.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        analysis: ModelAnalysis,
        rules: Rules,
        planner: Planner,
        waiting_bytes: int = 0,
        optimizer: OptimizerMemory | None = None,
    ) -> None:
        self.model_name, self.table = type(model).__name__, analysis.table
        self.budget, self.policy, self.seed = rules.budget, rules.policy, rules.seed
        self.ranking: LayerRanking | None = None
        self.optimizer = optimizer or OptimizerMemory()
        self.online: OnlineRanking | None = None
        self.needs = needs_of(rules.policy)
        self.evidence: Evidence | None = None
        self.needs_snapshot = needs_snapshot(self.needs)
        self.options = str(getattr(rules.policy, "options", ""))
        self._whole = bool(getattr(rules.policy, "whole", False))
        self._planner = planner
        self._mode, self.fidelity = rules.recompute, rules.fidelity
        self.micro_batch: int | None = None
        self._accumulates = waiting_bytes > 0
        self._head = tuple(Form.of(p.shape, p.element_size()) for p in analysis.head_parameters.values())
        self.recomputation = planner.everything if rules.recompute != "none" else planner.nothing

        batch = meta_batch(example)
        self._simulator: Simulator | None = None
        self._new_simulator = lambda: Simulator(
            model,
            batch,
            head=analysis.head,
            fuse=rules.fuse,
            fidelity=rules.fidelity,
            waiting_bytes=waiting_bytes,
            loss=rules.loss,
        )
        self._in_bytes = rules.budget is not None and rules.budget.scope.in_bytes
        self._room = self._room_in(self.table.names)
        self._simulated: dict[tuple[Any, ...], Timeline] = {}
        self._timeline: tuple[tuple[str, ...], Recomputation, int | None, Timeline] | None = None
        learn = False
        if not rules.policy.uses_ranking:
            self.pool, self.source = self.table.names, "none"
        elif rules.pool is not None:
            self.pool, self.source = rules.pool, "given"
        elif (known := self._known_ranking(rules)) is not None:
            self.ranking = known
            self.pool, self.source = known.top(POOL_SHARE), known.source
        else:
            self.pool, self.source = self.table.names, "online"
            learn = True
        self._room = self._room_in(self.pool)
        self.fit_to_budget()
        if learn:
            self.online = OnlineRanking(
                self.table, drawable=self._drawable(), share=POOL_SHARE, window=8 * STEPS_A_DRAW
            )

    def _room_in(self, pool: tuple[str, ...]) -> Reserve:
        return reserve_for(self.table, pool, self.policy, self.seed, in_bytes=self._in_bytes, whole=self._whole)

    def _known_ranking(self, rules: Rules) -> LayerRanking | None:
        """The ranking to draw by; ``None`` where it is learnt, which takes more draws than bytes have room for."""
        found = ranking_for(self.table, rules.ranking)
        if found is not None or not self._room.grows:
            return found
        if rules.ranking == "online":
            raise RankingError(
                "ranking='online' draws channels every few steps, and quantised layers keep each of them in floating "
                "point: no budget in bytes has room for that. Measure a ranking (trady.rank), or type "
                "ranking='structural' or an elements: budget"
            )
        return ranking_for(self.table, "structural")

    def has_room(self, selection: Selection, floats: Selection) -> bool:
        """Whether ``selection`` fits in a budget of bytes beside the channels that are kept in floating point."""
        if not self._in_bytes or not self._room.grows:
            return True
        kept = self.table.float_bytes(selection | floats)
        if self.budget is not None and self.budget.scope is Scope.UPDATE:
            return cost_of(self.table, selection, self.copies, kept).update_bytes <= self._amount
        return self._peak(self.timeline, selection, float_bytes=kept) <= self._amount

    def cost(self, selection: Selection) -> Cost:
        """Account for a selection."""
        return cost_of(self.table, selection, self.copies, self._room.reserved(selection))

    def fit_to_budget(self) -> None:
        """Refuse a budget that not even the cheapest channel fits in.

        Raises:
            BudgetError: It names the least possible.

        """
        if self.budget is None:
            if self.policy.name not in ("head", "full"):
                raise BudgetError(
                    f"policy {self.policy.name!r} needs a budget: type "
                    'budget="300 MiB", "update:1 MiB" or "elements:27946"'
                )
            return
        if self._mode == "auto" and self._planner.has_choice:
            if self.budget.scope is Scope.PEAK:
                self._keep_what_fits(self.budget.amount, self.optimizer)
            elif self._timeline is None:
                self._stay_near_inference(self.budget.amount)
        if not self.pool or self.policy.name == "head":
            return
        if self.budget.scope is Scope.PEAK:
            least = self._least_peak(self.timeline)
        else:
            asked = self._asked(0, 0, None)
            channel = min(asked.costs[name] for name in self.pool)
            least = min((asked.total(selection) for selection in self._smallest()), default=channel)
        if self.budget.amount < least:
            raise infeasible_budget(self.budget, least)

    def _smallest(self) -> tuple[Selection, ...]:
        """The least that the policy can select, where that is more than a channel."""
        smallest = getattr(self.policy, "smallest", None)
        return () if smallest is None else tuple(smallest(self._asked(0, 0, None)))

    def _least_peak(self, timeline: Timeline) -> int:
        nothing = self._peak(timeline, Selection())
        return min((self._peak(timeline, s) for s in self._smallest()), default=nothing)

    def _simulate(self, layers: tuple[str, ...], choice: Recomputation) -> Timeline:
        """Simulate a step with one channel a layer, each kind of step once."""
        chosen = tuple((segment.start, segment.end) for segment in choice.segments.get(True, ()))
        key = (layers, chosen, self.optimizer.in_backward)
        if key not in self._simulated:
            self._simulated[key] = self.simulator.timeline(
                layers=layers, segments=choice.segments, optimizer=self.optimizer
            )
        return self._simulated[key]

    @property
    def simulator(self) -> Simulator:
        """Simulates steps of this model."""
        if self._simulator is None:
            self._simulator = self._new_simulator()
        return self._simulator

    def _stay_near_inference(self, capacity: int) -> None:
        """Compute anew what takes the peak near to that of inference, where the budget does not speak of the peak."""
        resident, working = self.simulator.inference_bytes()
        self._keep_what_fits(resident + int(PEAK_OVER_INFERENCE * working), OptimizerMemory(), capacity)

    def _keep_what_fits(self, peak_bytes: int, optimizer: OptimizerMemory, capacity: int | None = None) -> None:
        """Compute anew only what a useful number of channels needs to fit."""
        wanted = self._useful(capacity)
        layers = self._simulated_layers
        self.recomputation, timeline = self._planner.least_time(
            lambda choice: self._simulate(layers, choice),
            lambda timeline: self._peak(timeline, wanted, optimizer),
            peak_bytes,
        )
        self._timeline = (layers, self.recomputation, self.optimizer.in_backward, timeline)

    def _useful(self, capacity: int | None) -> Selection:
        """Channels that are to fit before anything is kept that could be computed anew: the same after a restart."""
        typical = bool(self.needs)
        if self._whole:
            return self._select(0, 0, None, typical=typical)
        everything = self.table.all_elements
        useful = int(everything * USEFUL_SHARE) if capacity is None else capacity
        selection = self._select(0, 0, useful, typical=typical)
        return selection or min(self._smallest(), key=self.table.elements, default=selection)

    def _peak(
        self,
        timeline: Timeline,
        selection: Selection,
        optimizer: OptimizerMemory | None = None,
        float_bytes: int | None = None,
    ) -> int:
        return timeline.predicted_peak(
            selection,
            optimizer or self.optimizer,
            accumulates=self._accumulates,
            copies=self.needs_snapshot,
            float_bytes=self._room.reserved(selection) if float_bytes is None else float_bytes,
            norms=self.online is not None,
        )

    @property
    def state_copies(self) -> int:
        """Copies of a parameter that the optimizer keeps."""
        return self.optimizer.copies

    @property
    def copies(self) -> int:
        """Copies of what trains that are kept: by the optimizer, and to compare with an epoch ago."""
        return self.optimizer.copies + self.needs_snapshot

    @property
    def extremes(self) -> tuple[Recomputation, Recomputation | None]:
        """Nothing computed anew, and everything; ``None`` where there is nothing to choose."""
        return self._planner.nothing, self._planner.everything if self._planner.has_choice else None

    def least_peak(self) -> int:
        """The least peak budget that a step is possible in, with as much computed anew as helps."""
        timeline = self.timeline
        if self._mode == "auto" and self._planner.has_choice:
            layers, wanted = self._simulated_layers, self._useful(None)
            _, timeline = self._planner.least_time(
                lambda choice: self._simulate(layers, choice),
                lambda timeline: self._peak(timeline, wanted),
                0,
            )
        if self._whole:
            return self._peak(timeline, self._useful(None))
        return self._least_peak(timeline)

    @property
    def _simulated_layers(self) -> tuple[str, ...]:
        return () if self.policy.name == "head" else self.pool

    @property
    def timeline(self) -> Timeline:
        """Live bytes of a step that updates the layers of the pool."""
        layers, choice = self._simulated_layers, self.recomputation
        state = (layers, choice, self.optimizer.in_backward)
        if self._timeline is None or self._timeline[:3] != state:
            self._timeline = (*state, self._simulate(layers, choice))
        return self._timeline[3]

    def _costs(self) -> dict[str, int]:
        map_price, weight_price = self._prices()
        in_bytes = self.budget is not None and self.budget.scope is Scope.UPDATE
        draws = self._room.draws if in_bytes else 0
        return {
            layer.name: layer.activation_elements * map_price
            + layer.weight_elements * weight_price
            + draws * self.table.float_channel_bytes(layer.name)
            for layer in self.table
        }

    def _prices(self) -> tuple[int, int]:
        """What an activation element of one sample takes of the budget, and what a weight element does."""
        if self.budget is None or self.budget.scope is not Scope.UPDATE:
            return 1, 1
        sample = self.table.batch * self.table.element_bytes
        return sample, self.table.weight_element_bytes * (2 + self.copies)

    def _drawable(self) -> list[str]:
        if self.budget is None or self.budget.scope is Scope.PEAK:
            return list(self.table.names)
        return [name for name, cost in self._costs().items() if cost <= self.budget.amount]

    def draw(self, epoch: int, redraw: int) -> Selection:
        """Draw the channels of an epoch: a pure function of seed, epoch, redraw, pool and optimizer."""
        if self.budget is None or self.budget.scope is not Scope.PEAK:
            return self._select(epoch, redraw, None if self.budget is None else self.budget.amount)
        return self._largest_within(epoch, redraw, self.budget.amount)

    def _select(self, epoch: int, redraw: int, capacity: int | None, *, typical: bool = False) -> Selection:
        draw = self._asked(epoch, redraw, capacity)
        return (typical_selection if typical or self.lacks_evidence else draw_selection)(self.policy, draw)

    def _asked(self, epoch: int, redraw: int, capacity: int | None) -> Draw:
        return Draw(
            self.table,
            self.pool,
            self._costs(),
            capacity,
            self.seed,
            epoch,
            redraw,
            self.evidence,
            weight_price=self._prices()[1],
        )

    @property
    def lacks_evidence(self) -> bool:
        """Whether the policy cannot draw yet."""
        return bool(self.needs) and self.evidence is None

    def sweeps(self, trained: Selection, numbers: int = 0) -> tuple[Selection, ...]:
        """Cut all channels into selections whose gradients can be had inside the budget.

        Args:
            trained: The channels that train; the optimizer's state of them stays alive meanwhile.
            numbers: Numbers that are kept of a channel, where these are more than the weights that it has.

        Raises:
            BudgetError: Not one channel fits beside that state.

        """
        kept = self._kept_bytes(trained) + self._room.reserved(trained)
        table = _with_weights(self.table, numbers)
        selections = tuple(cut(self.table, lambda selection: self._taken(selection, kept, table) <= self._amount))
        if not selections and self.table.layers:
            one = (Selection({layer.name: np.zeros(1, dtype=np.int64)}) for layer in self.table)
            assert self.budget is not None
            raise infeasible_budget(self.budget, min(self._taken(selection, kept, table) for selection in one))
        return selections

    def _kept_bytes(self, trained: Selection) -> int:
        """State and copies of the channels that train, as far as the budget counts them."""
        peak = self.budget is not None and self.budget.scope is Scope.PEAK
        forms = [*(self._head if peak else ()), *compact_forms(self.table, trained)]
        return self.optimizer.kept_bytes(forms) + self.needs_snapshot * sum(form.whole for form in forms)

    @property
    def _amount(self) -> float:
        return math.inf if self.budget is None else self.budget.amount

    def _taken(self, selection: Selection, kept: int, table: ChannelTable) -> int:
        """What measuring a selection takes of the budget, beside the optimizer's state of the channels that train.

        ``table`` counts numbers of every sample as weights. In elements for one sample they are one a channel, which no
        channel has fewer weights than.
        """
        if self.budget is None or self.budget.scope is Scope.ELEMENTS:
            return self.table.elements(selection)
        if self.budget.scope is Scope.UPDATE:
            return cost_of(table, selection).update_bytes + kept
        timeline = replace(self._simulate(self.table.names, self.recomputation), table=table)
        peak = timeline.predicted_peak(selection, OptimizerMemory(), accumulates=self._accumulates)
        # Taking the numbers of a sample copies its channels, of one layer at a time.
        maps = (len(channels) * table[name].activation_elements for name, channels in selection.items())
        copied = max(maps, default=0) * table.element_bytes if table is not self.table else 0
        return peak + copied + kept

    def _largest_within(self, epoch: int, redraw: int, peak_bytes: int) -> Selection:
        """Halve the interval of B_mem until the policy's own draw fills the peak budget to within 1 %."""
        timeline = self.timeline

        def fits(selection: Selection) -> bool:
            return self._peak(timeline, selection) <= peak_bytes

        if self._whole:
            whole = self._select(epoch, redraw, None)
            if not fits(whole):
                raise infeasible_budget(self.budget or Budget(Scope.PEAK, peak_bytes), self._peak(timeline, whole))
            return whole
        everything = self.table.all_elements
        whole = self._select(epoch, redraw, everything)
        if fits(whole):
            return whole
        low, high, best = 0, everything, Selection()
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            selection = self._select(epoch, redraw, middle)
            if fits(selection):
                low, best = middle, selection
            else:
                high = middle
        return best or min(filter(fits, self._smallest()), key=lambda s: self._peak(timeline, s), default=best)

    def settle(self) -> None:
        """End the online phase: the layers that carry the gradient become the pool."""
        if self.online is not None:
            self.ranking = self.online.ranking()
            self.pool = self.ranking.top(POOL_SHARE)
            self.online = None

    def plan(self, head: tuple[str, ...], parameters: Mapping[str, nn.Parameter], epoch: int = 0) -> Plan:
        """Describe the decision."""
        selection = self.draw(epoch, 0)
        peak = self.budget is not None and self.budget.scope is Scope.PEAK
        predicted = self.predicted_parts(selection) if peak else {}
        return Plan(
            model=self.model_name,
            budget=self.budget,
            policy=self.policy.name,
            seed=self.seed,
            table=self.table,
            pool=self.pool,
            ranking=self.source,
            measured_on="" if self.ranking is None else self.ranking.measured_on,
            head=head,
            head_parameters=sum(p.numel() for p in parameters.values()),
            selection=selection,
            cost=self.cost(selection),
            predicted_peak_bytes=sum(predicted.values()) if peak else None,
            least_peak_bytes=self.timeline.least_bytes if peak else None,
            recomputed=self.recomputation.names,
            recomputable=self.recomputation.found,
            recomputed_share=self.recomputation.share_of_work,
            fidelity=self.fidelity,
            sparsity=self._mean_sparsity(selection, epoch, peak),
            predicted_parts=predicted,
            micro_batch=self.micro_batch,
            needs=self.needs.kinds,
            needs_each_epoch=self.needs.each_epoch,
            observed=not self.lacks_evidence,
        )

    def predicted_parts(self, selection: Selection, recomputation: Recomputation | None = None) -> dict[str, int]:
        """Simulate a step with just these channels: what its peak is made of, in bytes.

        The timeline only bounds the peak from above.
        """
        segments = (recomputation or self.recomputation).segments
        timeline = self.simulator.timeline(segments=segments, selection=selection, parts=True, optimizer=self.optimizer)
        forms = [*self._head, *compact_forms(self.table, selection)]
        state, parts = self.optimizer.kept_bytes(forms), dict(timeline.parts)
        if self.needs_snapshot:
            parts["compact parameters"] = parts.get("compact parameters", 0) + sum(form.whole for form in forms)
        if self.online is not None:
            parts["temporaries"] = parts.get("temporaries", 0) + NORM_BYTES * sum(map(len, selection.channels.values()))
        if self.state_copies > 1:  # Adam counts the steps of every tensor
            state += _COUNTER_BYTES * len(forms)
        if floats := self._room.reserved(selection):
            parts["weights"] = parts.get("weights", 0) + floats
        return {**parts, **({"optimizer state": state} if state else {})}

    def _mean_sparsity(self, selection: Selection, epoch: int, peak: bool) -> Sparsity | None:
        """Look at the draws of further epochs too, where a draw costs next to nothing."""
        if peak or self._whole or self.table.channel_count > MANY_CHANNELS:
            return None
        drawn = [selection, *(self.draw(e, 0) for e in range(epoch + 1, epoch + EPOCHS_LOOKED_AT))]
        return Sparsity.of([cost_of(self.table, s, self.copies) for s in drawn])


def _with_weights(table: ChannelTable, least: int) -> ChannelTable:
    """The table as if no channel had fewer weight elements than ``least``."""
    layers = (replace(layer, weight_elements=max(layer.weight_elements, least)) for layer in table)
    return replace(table, layers=tuple(layers)) if least else table
