"""What a kind of budget must say. A new kind is one file here and one registration in ``__init__``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.spending import Spending


class DoesNotFitError(Exception):
    """A selection that cannot be made smaller takes more than the budget.

    Attributes:
        amount: What it takes.
    """

    def __init__(self, amount: int) -> None:
        super().__init__(amount)
        self.amount = amount


class BudgetScope(ABC):
    """What a budget bounds, and what a selection takes of it. Two of one kind are equal.

    Attributes:
        name: In front of the colon: ``peak`` in ``peak:300 MiB``.
        meaning: What is bounded, for messages.
        example: A budget to type.
        in_bytes: Whether amounts are bytes; if not, they are elements for one sample.
        bounds_peak: Whether the amount bounds the peak of a whole training step.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    example: ClassVar[str]
    in_bytes: ClassVar[bool] = True
    bounds_peak: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<budget scope {self.name}>"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def peak_of(self, amount: int) -> int | None:
        """What the amount leaves for the peak of a whole training step; ``None`` where something else is bounded."""
        return amount if self.bounds_peak else None

    def of_peak(self, peak_bytes: int) -> int:
        """The amount that leaves so much for the peak of a step."""
        return peak_bytes

    def to_json(self, peak_bytes: int | None) -> dict[str, Any]:
        """What a plan says of the budget beside its amount; ``peak_bytes`` is the predicted peak of a step."""
        return {}

    def facts(self, peak_bytes: int | None) -> Iterable[tuple[str, str]]:
        """The same for people: names and values."""
        return ()

    def as_planned(self, plan: Mapping[str, Any]) -> BudgetScope:
        """The scope as it was when a plan was made; raises what reading a damaged one raises."""
        return self

    def prices(self, table: ChannelTable, copies: int) -> tuple[int, int]:
        """What an activation element of one sample takes, and what a weight element does.

        Args:
            table: The layers.
            copies: Copies of what trains that are kept: by the optimizer, and to compare with an epoch ago.

        """
        return 1, 1

    def priced_draws(self, draws: int) -> int:
        """For how many of the draws that room is reserved for a channel's cost includes its float weights."""
        return 0

    def minimum(self, spending: Spending) -> int:
        """The minimum amount that the policy can do with: its smallest selection, or one channel."""
        asked = spending.draw_of(0, 0, None)
        channel = min(asked.costs[name] for name in spending.moment.pool)
        return min((asked.total(selection) for selection in spending.smallest()), default=channel)

    def draw(self, spending: Spending, amount: int | None, epoch: int, redraw: int) -> Selection:
        """Draw the channels of an epoch; ``None`` is no limit.

        Raises:
            DoesNotFitError: The policy's selection cannot be made as small as that.

        """
        return spending.select(epoch, redraw, amount)

    def drawable(self, spending: Spending, amount: int) -> list[str]:
        """Layers of which one channel fits."""
        return [name for name, cost in spending.costs.items() if cost <= amount]

    @abstractmethod
    def measuring(self, spending: Spending, selection: Selection, kept: int, table: ChannelTable) -> int:
        """What measuring a selection takes, beside what the channels that train keep.

        Args:
            spending: The moment.
            selection: The channels that are measured together.
            kept: State and copies of the channels that train, in bytes (:meth:`kept_while_measuring`).
            table: Counts numbers that are kept of every sample as weights.

        """

    def step_amount(self, spending: Spending, selection: Selection) -> int:
        """What a step with this selection takes of the budget."""
        return spending.draw_of(0, 0, None).total(selection)

    def kept_while_measuring(self, spending: Spending, trained: Selection) -> int:
        """State and copies of the channels that train, as far as the budget counts them."""
        return spending.kept_bytes(trained, with_head=self.bounds_peak)

    def has_room(self, spending: Spending, selection: Selection, float_bytes: int, amount: int) -> bool:
        """Whether a selection fits beside the channels of quantised layers that are in floating point already."""
        return True
