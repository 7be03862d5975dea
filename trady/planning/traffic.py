"""What the processes of a training send each other in a step: compact gradients, beside those of all weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.errors import BudgetError
from trady.process.ranks import Traffic, traffic_of
from trady.report.units import format_bytes, format_percent
from trady.simulation.timeline import compact_forms


@dataclass(frozen=True)
class StepTraffic:
    """What a process sends in a step.

    Attributes:
        ranks: How many processes train together, each with the whole model and a batch of its own.
        averaged_bytes: Gradients that a process hands to collectives: channels that train, the head, and for each
            tensor whether there is one.
        calls: Collectives.
        full_bytes: Gradients of all weights that are in floating point, which full fine-tuning averages.
    """

    ranks: int
    averaged_bytes: int
    calls: int
    full_bytes: int

    @property
    def sent_bytes(self) -> int:
        """What a process sends, and receives as much, in a ring: Patarasuk and Yuan, 2009."""
        return in_a_ring(self.averaged_bytes, self.ranks)

    @property
    def full_sent_bytes(self) -> int:
        """The same of full fine-tuning."""
        return in_a_ring(self.full_bytes, self.ranks)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "ranks": self.ranks,
            "averaged_bytes": self.averaged_bytes,
            "calls": self.calls,
            "sent_bytes": self.sent_bytes,
            "full_sent_bytes": self.full_sent_bytes,
        }

    def __str__(self) -> str:
        share = self.sent_bytes / max(self.full_sent_bytes, 1)
        return (
            f"each of {self.ranks} processes has the whole model and the peak above, and sends and receives "
            f"{format_bytes(self.sent_bytes)} a step, in {self.calls} call{'s' * (self.calls > 1)}: "
            f"{format_percent(share)} of the {format_bytes(self.full_sent_bytes)} that the gradients of all weights are"
        )


def step_traffic(
    table: ChannelTable, selection: Selection, head: Iterable[nn.Parameter], model: nn.Module, ranks: int
) -> StepTraffic:
    """Predict what a process sends in a step.

    Args:
        table: The layers.
        selection: The channels that train.
        head: Parameters of the head.
        model: The model, whose weights full fine-tuning would train.
        ranks: How many processes train together.
    """
    width = table.weight_element_bytes
    there = [(width, form.whole) for form in compact_forms(table, selection)]
    there += [(parameter.element_size(), parameter.nbytes) for parameter in head]
    # One number for each says whether it is there; it has the type of the first.
    flags = (there[0][0], there[0][0] * len(there)) if there else (width, 0)
    averaged = Traffic() if ranks == 1 else traffic_of([*there, flags])
    full = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    return StepTraffic(ranks, averaged.nbytes, averaged.calls, full)


def in_a_ring(nbytes: int, ranks: int) -> int:
    """What each of n processes sends in a ring that sums up so many bytes: ``2 (n - 1) / n`` times as many."""
    return 2 * (ranks - 1) * nbytes // ranks


def check_ranks(ranks: int) -> None:
    """Refuse a number of processes that is none.

    Raises:
        BudgetError: It is less than 1.
    """
    if type(ranks) is not int or ranks < 1:
        raise BudgetError(f"ranks is {ranks!r}; give the number of processes that train together, such as 8")
