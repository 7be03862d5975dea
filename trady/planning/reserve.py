"""Reserve for the float channels of quantised layers, whose number grows with the draws."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.policies import Draw, Policy, needs_of
from trady.policies.base import all_or_nothing

#: A budget in bytes leaves room for the float channels of this many draws; then they are drawn no more.
DRAWS = 10


@dataclass(frozen=True)
class Reserve:
    """What a selection reserves for the float channels of quantised layers.

    Attributes:
        table: The layers.
        draws: The number of draws of its size; never more than for all channels that can be drawn.
        most_bytes: What all of these take.
    """

    table: ChannelTable
    draws: int
    most_bytes: int

    @property
    def grows(self) -> bool:
        """Whether draws add to what is kept."""
        return self.draws > 1 and self.most_bytes > 0

    def reserved(self, selection: Selection) -> int:
        """Bytes reserved for the draws of a training that draws as much as ``selection``."""
        return min(self.draws * self.table.float_bytes(selection), self.most_bytes)


def reserve_for(table: ChannelTable, pool: Collection[str], policy: Policy, seed: int, *, in_bytes: bool) -> Reserve:
    """Say how much is reserved.

    Args:
        table: The layers.
        pool: Those that channels are drawn from.
        policy: Draws them.
        seed: Seed of the draws.
        in_bytes: Whether the budget promises bytes; where it does not, a plan counts one draw.

    """
    most = sum(layer.channels * table.float_channel_bytes(layer.name) for layer in table if layer.name in pool)
    several = in_bytes and most > 0 and not all_or_nothing(policy) and not _draws_once(table, pool, policy, seed)
    return Reserve(table, DRAWS if several else 1, most)


def _draws_once(table: ChannelTable, pool: Collection[str], policy: Policy, seed: int) -> bool:
    if needs_of(policy):
        return False
    costs, half = {layer.name: layer.elements for layer in table}, table.all_elements // 2
    first, second = (policy.select(Draw(table, tuple(pool), costs, half, seed, epoch)) for epoch in (0, 1))
    return first == second
