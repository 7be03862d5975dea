"""What a policy is: a rule that says which channels train in an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.policies.evidence import Evidence, Values


@dataclass(frozen=True)
class Draw:
    """All that a policy may look at. Equal draws give equal selections: on every rank, and after a restart.

    Attributes:
        table: The updatable layers and their costs.
        pool: Names of the top-K layers (all layers while the ranking is not known yet).
        costs: What one channel of each layer takes, in the budget's own unit.
        capacity: How much the selection may take, in the same unit; ``None`` is no limit.
        seed: Seed of the run.
        epoch: Epoch that the selection is for, from 0.
        redraw: Counts the draws inside one epoch (online ranking), from 0.
        evidence: What was measured for the policy; ``None`` for one that has no :class:`~trady.policies.Needs`.
        weight_price: What one weight element takes, in the same unit; the rest of a channel's cost is its
            feature map.
    """

    table: ChannelTable
    pool: tuple[str, ...]
    costs: dict[str, int]
    capacity: int | None
    seed: int
    epoch: int
    redraw: int = 0
    evidence: Evidence | None = None
    weight_price: int = 1

    def measured(self, kind: str) -> Values:
        """Layer name to the measured values of its channels.

        Raises:
            PolicyError: Nothing of that kind was measured.

        """
        return (self.evidence or Evidence())[kind]

    def cost(self, name: str, channels: int, outputs: int | None = None) -> int:
        """What input channels of a layer take where only ``outputs`` of its output channels train (``None`` is all)."""
        layer, total = self.table[name], channels * self.costs[name]
        weights = channels * layer.weight_elements
        return total - (weights - layer.share(weights, outputs)) * self.weight_price

    def total(self, selection: Selection) -> int:
        """What a selection takes of the capacity."""
        return sum(self.cost(name, len(c), selection.output_count(name)) for name, c in selection.items())


@runtime_checkable
class Policy(Protocol):
    """A rule that says where to update.

    Optional are the attribute ``needs`` (:class:`~trady.policies.Needs`), what it wants measured before it draws;
    ``whole`` (true: its selection cannot be made smaller, it raises ``BudgetError`` instead); ``names_layers`` (true:
    it is given the layers that train, and has no others); ``options``, what an instance was made with as text, so that
    a run is not resumed with others; the method ``typical(draw)``, a selection to account for in a plan while nothing
    is measured (by default channels drawn uniformly in the pool); and ``smallest(draw)``, the smallest selections it
    can make, where that is more than one channel.
    """

    name: str
    uses_ranking: bool

    def select(self, draw: Draw) -> Selection:
        """Return the channels to train; their cost must not exceed ``draw.capacity``."""
        ...


def all_or_nothing(policy: object) -> bool:
    """Whether a policy's selection cannot be made smaller: its attribute ``whole``."""
    return bool(getattr(policy, "whole", False))


def names_layers(policy: object) -> bool:
    """Whether a policy is given the layers that train, so that no others can take their place."""
    return bool(getattr(policy, "names_layers", False))
