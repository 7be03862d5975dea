"""``process:400 MiB``: resident memory of the whole process, with its imports, weights and data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.scopes.base import DoesNotFitError
from trady.planning.scopes.peak import Peak
from trady.planning.spending import Spending
from trady.report.units import format_bytes

#: Resident memory over tensor memory of a step, beyond weights and batch, where freed memory goes back to the kernel
#: and where the allocator keeps it; and what a first step brings beside tensors: ``python -m benchmarks.process``.
GROWTH, GROWTH_WHERE_KEPT, FIRST_STEP_BYTES = 1.05, 3.8, 28 << 20


@dataclass(frozen=True)
class ProcessMemory:
    """A process with a model and its data, before the first step.

    Attributes:
        other_bytes: Resident beside the model and the batch: the interpreter, PyTorch, data that lies in memory.
        tensor_bytes: Weights, buffers and batch.
        growth: Resident bytes over tensor bytes of what a step takes beyond those.
    """

    other_bytes: int
    tensor_bytes: int
    growth: float = GROWTH

    def at_peak(self, peak_bytes: int) -> int:
        """Resident bytes of the process when tensors take ``peak_bytes``, weights and batch included."""
        step = max(peak_bytes - self.tensor_bytes, 0)
        return self.other_bytes + FIRST_STEP_BYTES + peak_bytes + int(step * (self.growth - 1))

    def room(self, process_bytes: int) -> int:
        """Tensor bytes of a step, weights and batch included, that fit in ``process_bytes``."""
        step = process_bytes - self.other_bytes - FIRST_STEP_BYTES - self.tensor_bytes
        return max(self.tensor_bytes + int(step / self.growth), 0)


class Process(Peak):
    """The peak of a step, and all that is in memory beside it.

    Args:
        memory: The process that trains; ``None`` until it is measured (:meth:`trady.planning.request.Request.decide`).
    """

    name = "process"
    meaning = "memory of the whole process: imports, weights, data and the step"
    example = "process:400 MiB"

    def __init__(self, memory: ProcessMemory | None = None) -> None:
        self.memory = memory

    def peak_of(self, amount: int) -> int | None:
        """What is left for the tensors of a step; ``None`` while the process is not measured."""
        return None if self.memory is None else self.memory.room(amount)

    def of_peak(self, peak_bytes: int) -> int:
        """What the process takes with it."""
        assert self.memory is not None
        return self.memory.at_peak(peak_bytes)

    def to_json(self, peak_bytes: int | None) -> dict[str, Any]:
        """The process as it was measured, and the predicted peak of its memory."""
        if self.memory is None:
            return {}
        predicted = None if peak_bytes is None else self.of_peak(peak_bytes)
        return {"process": asdict(self.memory), "predicted_process_bytes": predicted}

    def facts(self, peak_bytes: int | None) -> Iterable[tuple[str, str]]:
        """The same for people."""
        if self.memory is not None:
            beside = f"{format_bytes(self.memory.other_bytes)} beside weights and batch"
            predicted = (
                "" if peak_bytes is None else f"; predicted at its peak: {format_bytes(self.of_peak(peak_bytes))}"
            )
            yield "process", beside + predicted

    def as_planned(self, plan: Mapping[str, Any]) -> Process:
        """The process that the plan was made in."""
        found = plan.get("process")
        return self if found is None else Process(ProcessMemory(**found))

    def minimum(self, spending: Spending) -> int:
        """The process at the minimum peak."""
        return self.of_peak(super().minimum(spending))

    def step_amount(self, spending: Spending, selection: Selection) -> int:
        """The process at the peak of the step."""
        return self.of_peak(super().step_amount(spending, selection))

    def draw(self, spending: Spending, amount: int | None, epoch: int, redraw: int) -> Selection:
        """Draw as for the peak that is left."""
        assert amount is not None
        try:
            return super().draw(spending, self.peak_of(amount), epoch, redraw)
        except DoesNotFitError as error:
            raise DoesNotFitError(self.of_peak(error.amount)) from None

    def measuring(self, spending: Spending, selection: Selection, kept: int, table: ChannelTable) -> int:
        """The process while a selection is measured."""
        return self.of_peak(super().measuring(spending, selection, kept, table))

    def has_room(self, spending: Spending, selection: Selection, float_bytes: int, amount: int) -> bool:
        """Held against the peak that is left."""
        return super().has_room(spending, selection, float_bytes, self.peak_of(amount) or 0)
