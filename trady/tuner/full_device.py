"""A GPU whose memory ran out, or will: what was predicted, what was found free, and what would fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trady.errors import ResourceError, TradyError, TradyWarning
from trady.model.batch import Batch
from trady.planning.conditions import Conditions, shapes_of
from trady.planning.micro_batch import AUTO, chunk_sizes
from trady.report.units import format_bytes
from trady.tuner.draws import Draws
from trady.tuner.guard import simulating

if TYPE_CHECKING:
    from trady.tuner.tuner import Tuner

#: Of what is free, this much is taken to be usable: the allocator rounds, and libraries have workspaces.
USABLE = 0.9


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a CUDA device, in bytes.

    Attributes:
        free: In nobody's hands.
        reserved: In the hands of this process' allocator, for tensors that are there or were.
        total: All of it.
    """

    free: int
    reserved: int
    total: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """Ask the driver and the allocator."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(free, torch.cuda.memory_reserved(device), total)

    @property
    def available(self) -> int:
        """What tensors of this process can take."""
        return self.free + self.reserved

    @property
    def usable(self) -> int:
        """The same, less what the allocator and libraries need."""
        return int(USABLE * self.available)

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.available)} of its {format_bytes(self.total)} are there for this process "
            f"({format_bytes(self.free)} free, {format_bytes(self.reserved)} in its allocator)"
        )


def out_of_memory(tuner: Tuner, inputs: Any, error: BaseException) -> ResourceError:
    """Return the error that says what a step on a GPU takes, what the GPU has, and what would fit.

    Args:
        tuner: What trains, and how.
        inputs: The batch that the model was called with, or a part of it.
        error: PyTorch's.

    """
    draws, model = tuner._draws, tuner.model
    decision, moment, selection = draws.decision, draws.moment, draws.selection
    batch = Batch.of(inputs, model)
    memory = DeviceMemory.of(batch.device_in(model) or torch.device("cuda"))
    said = str(error).partition("\n")[0].partition(". GPU ")[0][:120]
    try:
        with simulating(batch, model):
            needed = sum(decision.spending(moment).peak_parts(selection).values())
            fits = "; ".join(_what_fits(draws, batch, memory)) if needed > memory.usable else ""
    except (TradyError, RuntimeError, TypeError, ValueError):  # the model cannot be followed here
        return ResourceError(f"the GPU's memory ran out ({said}): {memory}. Take a smaller batch or budget")
    told = f"the GPU's memory ran out ({said}): a step was predicted to take {format_bytes(needed)}, and {memory}"
    if needed > memory.usable:
        return ResourceError(f"{told}. {fits or 'Nothing that is known here would fit'}; or end other programs")
    return ResourceError(
        f"{told}, which that fits in: the rest is the allocator's fragments, workspaces, or tensors that the loop "
        "keeps. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or take a smaller batch or budget"
    )


def warn_if_full(tuner: Tuner) -> None:
    """Say in front of a training under a ``peak:`` budget that its device has less memory than a step may take."""
    draws, device = tuner._draws, next((p.device for p in tuner.model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or not draws.decision.scope.bounds_peak:
        return
    predicted, memory = draws.decision.spending(draws.moment).peak(draws.selection), DeviceMemory.of(device)
    if predicted > memory.available:
        warnings.warn(
            f"a step is predicted to take {format_bytes(predicted)} of the GPU, and {memory}: "
            f'budget="peak:{_rounded_down(memory.usable)}" would fit, or end other programs',
            TradyWarning,
            stacklevel=3,
        )


def _what_fits(draws: Draws, batch: Batch, memory: DeviceMemory) -> Iterator[str]:
    decision = draws.decision
    least = decision.minimum_peak(draws.moment)
    if least <= memory.usable:
        yield f'budget="peak:{_rounded_down(memory.usable)}" would fit'
    else:
        yield f"with this batch, no budget below {format_bytes(least)} is possible"
    for size in chunk_sizes(batch, AUTO)[1:] if batch.may_be_cut else ():
        if size is not None and _peak(draws, batch.chunk(0, size)) <= memory.usable:
            yield f"{size} sample{'s' if size > 1 else ''} at a time would fit with the channels of now (micro_batch)"
            return


def _peak(draws: Draws, part: Batch) -> int:
    """The peak of a step on a smaller batch in which the same channels train."""
    decision = draws.decision
    planned = decision.loop.planned
    conditions = Conditions((shapes_of(part),) * len(planned.calls), True, planned.autocast)
    case = decision.case([part] * len(planned.calls), conditions, decision.loop.waiting_bytes)
    return decision.of_steps(case).spending(draws.moment).peak(draws.selection)


def _rounded_down(amount: int) -> str:
    unit, size = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if amount >= s), ("B", 1))
    return f"{amount * 10 // size / 10:g} {unit}"
