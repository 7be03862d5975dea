"""``300 MiB`` or ``peak:300 MiB``: the tensor memory of a whole training step."""

from __future__ import annotations

from dataclasses import replace

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.scopes.base import BudgetScope, DoesNotFitError
from trady.planning.spending import Spending
from trady.simulation.optimizer_memory import OptimizerMemory


class Peak(BudgetScope):
    """Weights, activations, gradients, optimizer state and temporaries, at their peak."""

    name = "peak"
    meaning = "tensor memory of a whole training step"
    example = "300 MiB"
    bounds_peak = True

    def minimum(self, spending: Spending) -> int:
        """The peak of a step with the smallest selection, or with none."""
        return spending.minimum_peak()

    def step_amount(self, spending: Spending, selection: Selection) -> int:
        """The peak of the step."""
        return spending.peak(selection)

    def drawable(self, spending: Spending, amount: int) -> list[str]:
        """All of them: the peak of a step is not a sum over channels."""
        return list(spending.table.names)

    def draw(self, spending: Spending, amount: int | None, epoch: int, redraw: int) -> Selection:
        """Halve the interval of B_mem until the policy's own draw fills the budget to within 1 %."""
        assert amount is not None
        timeline, everything = spending.timeline, spending.table.all_elements

        def fits(selection: Selection) -> bool:
            return spending.peak(selection, timeline) <= amount

        if spending.all_or_nothing:
            selection = spending.select(epoch, redraw, None)
            if not fits(selection):
                raise DoesNotFitError(spending.peak(selection, timeline))
            return selection
        largest = spending.select(epoch, redraw, everything)
        if fits(largest):
            return largest
        low, high, best = 0, everything, Selection()
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            selection = spending.select(epoch, redraw, middle)
            if fits(selection):
                low, best = middle, selection
            else:
                high = middle
        smallest = filter(fits, spending.smallest())
        return best or min(smallest, key=lambda s: spending.peak(s, timeline), default=best)

    def measuring(self, spending: Spending, selection: Selection, kept: int, table: ChannelTable) -> int:
        """The peak of a step that updates nothing, and copies of one layer's channels where samples are told apart."""
        timeline = replace(spending.timeline_of(spending.moment.recomputation, spending.table.names), table=table)
        peak = timeline.predicted_peak(selection, OptimizerMemory())
        maps = (len(channels) * table[name].activation_elements for name, channels in selection.items())
        copied = max(maps, default=0) * table.element_bytes if table is not spending.table else 0
        return peak + copied + kept

    def has_room(self, spending: Spending, selection: Selection, float_bytes: int, amount: int) -> bool:
        """Held against the peak of a step."""
        return spending.peak(selection, float_bytes=float_bytes) <= amount
