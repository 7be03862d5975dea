"""What selections take of a budget, at one moment of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from trady.channels.cost import Cost, cost_of
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.peaks import Peaks
from trady.planning.recomputation import Recomputation
from trady.planning.reserve import Reserve
from trady.policies import Draw, Evidence, Policy, draw_selection, needs_of, typical_selection
from trady.policies.base import all_or_nothing
from trady.ranking.ranking import LayerRanking
from trady.simulation.optimizer_memory import Form, OptimizerMemory
from trady.simulation.timeline import NORM_BYTES, Timeline, compact_forms

#: As many of all channels (by elements) are to fit before anything is kept that could be recomputed.
USEFUL_SHARE = 0.02

#: A number of steps, as torch.optim keeps it.
COUNTER_BYTES = 4


@dataclass(frozen=True, eq=False)
class Moment:
    """What a draw depends on and training changes. The tuner keeps the one of now.

    Attributes:
        pool: Layers that channels are drawn from.
        recomputation: What the backward pass recomputes.
        optimizer: What the optimizer takes, as far as it is known.
        ranking: The ranking that the pool is from; ``None`` while it is learnt, or where none is needed.
        learns: Whether the ranking is being learnt, which keeps the norms of gradients.
        evidence: What was measured for the policy; ``None`` until then.
    """

    pool: tuple[str, ...]
    recomputation: Recomputation
    optimizer: OptimizerMemory
    ranking: LayerRanking | None = None
    learns: bool = False
    evidence: Evidence | None = None


@dataclass(frozen=True, eq=False)
class Spending:
    """What selections take at a moment, and what the policy selects then.

    Attributes:
        table: Every layer, with the cost of a channel.
        policy: Draws the channels.
        seed: Seed of the draws.
        peaks: Simulates steps.
        reserve: For the float channels of quantised layers.
        moment: What has changed since the training began.
        head: The parameters that are always trained.
        needs_snapshot: Whether a copy of what trains is kept to compare with an epoch ago.
        prices: What an activation element of one sample takes of the budget, and what a weight element does.
        priced_draws: Draws whose float channels the cost of a channel includes.
        held: Layers that a person or a limit of time keeps from training: policies do not see them.
    """

    table: ChannelTable
    policy: Policy
    seed: int
    peaks: Peaks
    reserve: Reserve
    moment: Moment
    head: tuple[Form, ...] = ()
    needs_snapshot: bool = False
    prices: tuple[int, int] = (1, 1)
    priced_draws: int = 0
    held: frozenset[str] = frozenset()

    # -- what the policy selects ---------------------------------------------------------------------

    @cached_property
    def drawable(self) -> ChannelTable:
        """The layers that channels may be drawn from."""
        if not self.held:
            return self.table
        return replace(self.table, layers=tuple(layer for layer in self.table if layer.name not in self.held))

    @property
    def all_or_nothing(self) -> bool:
        """Whether the policy's selection cannot be made smaller."""
        return all_or_nothing(self.policy)

    @property
    def lacks_evidence(self) -> bool:
        """Whether the policy cannot draw yet."""
        return bool(needs_of(self.policy)) and self.moment.evidence is None

    def draw_of(self, epoch: int, redraw: int, capacity: int | None) -> Draw:
        """What the policy is asked; ``capacity`` is in the budget's own unit, ``None`` for no limit."""
        return Draw(
            self.drawable,
            tuple(name for name in self.moment.pool if name not in self.held),
            dict(self.costs),
            capacity,
            self.seed,
            epoch,
            redraw,
            self.moment.evidence,
            weight_price=self.prices[1],
        )

    def select(self, epoch: int, redraw: int, capacity: int | None, *, typical: bool = False) -> Selection:
        """Draw channels; while nothing is measured, or if asked for, a selection of typical size."""
        draw = self.draw_of(epoch, redraw, capacity)
        return (typical_selection if typical or self.lacks_evidence else draw_selection)(self.policy, draw)

    def smallest(self) -> tuple[Selection, ...]:
        """The minimum that the policy can select, where that is more than a channel."""
        smallest = getattr(self.policy, "smallest", None)
        return () if smallest is None else tuple(smallest(self.draw_of(0, 0, None)))

    def useful(self, capacity: int | None) -> Selection:
        """Channels that are to fit before anything is kept that could be recomputed: the same after a restart."""
        typical = bool(needs_of(self.policy))
        if self.all_or_nothing:
            return self.select(0, 0, None, typical=typical)
        useful = int(self.drawable.all_elements * USEFUL_SHARE) if capacity is None else capacity
        selection = self.select(0, 0, useful, typical=typical)
        return selection or min(self.smallest(), key=self.table.elements, default=selection)

    # -- what it takes -------------------------------------------------------------------------------

    @cached_property
    def costs(self) -> Mapping[str, int]:
        """What one channel of each layer takes, in the budget's own unit."""
        activation_price, weight_price = self.prices
        return {
            layer.name: layer.activation_elements * activation_price
            + layer.weight_elements * weight_price
            + self.priced_draws * self.table.float_channel_bytes(layer.name)
            for layer in self.table
        }

    @property
    def copies(self) -> int:
        """Copies of what trains that are kept: by the optimizer, and to compare with an epoch ago."""
        return self.moment.optimizer.copies + self.needs_snapshot

    def cost(self, selection: Selection, float_bytes: int | None = None) -> Cost:
        """Account for a selection; ``float_bytes`` in the place of what is reserved for its float channels."""
        reserved = self.reserve.reserved(selection) if float_bytes is None else float_bytes
        return cost_of(self.table, selection, self.copies, reserved)

    def kept_bytes(self, trained: Selection, *, with_head: bool) -> int:
        """Optimizer state and copies of the channels that train, and of the head."""
        forms = [*(self.head if with_head else ()), *compact_forms(self.table, trained)]
        return self.moment.optimizer.kept_bytes(forms) + self.needs_snapshot * sum(form.whole for form in forms)

    # -- peaks ---------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that train at some time."""
        return () if self.policy.name == "head" else self.moment.pool

    @property
    def timeline(self) -> Timeline:
        """Live bytes of a step that updates the layers of the pool."""
        return self.timeline_of(self.moment.recomputation)

    def timeline_of(self, choice: Recomputation, layers: tuple[str, ...] | None = None) -> Timeline:
        """The same where something else is recomputed, or other layers train."""
        return self.peaks.timeline(self.layers if layers is None else layers, choice, self.moment.optimizer)

    def peak(
        self,
        selection: Selection,
        timeline: Timeline | None = None,
        *,
        optimizer: OptimizerMemory | None = None,
        float_bytes: int | None = None,
    ) -> int:
        """Bound the peak of a step in which ``selection`` trains, in bytes, weights included."""
        return (timeline or self.timeline).predicted_peak(
            selection,
            optimizer or self.moment.optimizer,
            copies=self.needs_snapshot,
            float_bytes=self.reserve.reserved(selection) if float_bytes is None else float_bytes,
            norms=self.moment.learns,
        )

    def minimum_peak(self, timeline: Timeline | None = None) -> int:
        """The minimum peak that the policy can do with."""
        timeline = timeline or self.timeline
        nothing = self.peak(Selection(), timeline)
        return min((self.peak(selection, timeline) for selection in self.smallest()), default=nothing)

    def peak_parts(self, selection: Selection, choice: Recomputation | None = None) -> dict[str, int]:
        """Simulate a step with just these channels: what its peak is made of, in bytes.

        The timeline only bounds the peak from above.
        """
        optimizer = self.moment.optimizer
        parts = dict(self.peaks.parts(selection, choice or self.moment.recomputation, optimizer))
        forms = [*self.head, *compact_forms(self.table, selection)]
        state = optimizer.kept_bytes(forms)
        if self.needs_snapshot:
            parts["compact parameters"] = parts.get("compact parameters", 0) + sum(form.whole for form in forms)
        if self.moment.learns:
            parts["temporaries"] = parts.get("temporaries", 0) + NORM_BYTES * sum(map(len, selection.channels.values()))
        if optimizer.copies > 1:  # Adam counts the steps of every tensor
            state += COUNTER_BYTES * len(forms)
        if floats := self.reserve.reserved(selection):
            parts["weights"] = parts.get("weights", 0) + floats
        return {**parts, **({"optimizer state": state} if state else {})}

    def recomputing(
        self, peak_bytes: int, *, optimizer: OptimizerMemory | None = None, capacity: int | None = None
    ) -> Recomputation:
        """Recompute only what a useful number of channels needs to fit in ``peak_bytes``."""
        wanted = self.useful(capacity)
        choice, _ = self.peaks.planner.least_time(
            self.timeline_of, lambda timeline: self.peak(wanted, timeline, optimizer=optimizer), peak_bytes
        )
        return choice

    def with_recomputation(self, choice: Recomputation) -> Spending:
        """The same with another choice of what is recomputed."""
        return replace(self, moment=replace(self.moment, recomputation=choice))
