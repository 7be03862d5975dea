"""A process budget, held against the process that is there now."""

from __future__ import annotations

import gc
import warnings

from torch import Tensor, nn

from trady.errors import BudgetError, TradyWarning
from trady.model.batch import Batch
from trady.model.parameters import own_parameters
from trady.planning.budget import Budget
from trady.planning.scopes.process import GROWTH, GROWTH_WHERE_KEPT, Process, ProcessMemory
from trady.process.allocator import trim
from trady.process.ready import make_ready
from trady.process.resident import resident, resident_bytes_of

#: How far a process may have grown since its budget was measured before that is worth a warning.
_GROWN_BYTES = 8 << 20


#: What is measured is rounded up to that, so that a process that is started again mostly has the same room.
_GRAIN_BYTES = 4 << 20


def is_process(budget: Budget) -> bool:
    """Whether a budget bounds the memory of the process."""
    return isinstance(budget.scope, Process)


def ready_for(budget: Budget | None) -> None:
    """Make the process ready (:func:`trady.process.ready.make_ready`) if a budget bounds its memory."""
    if budget is not None and is_process(budget):
        make_ready()


def measured(budget: Budget, model: nn.Module, batch: Batch) -> Budget:
    """Return a process budget that knows what of it is left for a step; any other budget as it is.

    The process is made ready first (:func:`trady.process.ready.make_ready`). A budget that was measured before, in a
    run that is resumed or a plan that is used again, stays as it is, so that the same channels are drawn; where the
    process has more in memory now, it warns.

    Args:
        budget: The budget.
        model: The model; weights on the meta device will be in memory when it trains.
        batch: A full batch.

    Raises:
        BudgetError: The system does not say what a process has in memory, or the model is not on the CPU.
    """
    if not isinstance(budget.scope, Process):
        return budget
    devices = {p.device.type for p in own_parameters(model)} - {"cpu", "meta"}
    if devices:
        raise BudgetError(
            f'budget "{budget}" is for models on the CPU, and this one is on {", ".join(sorted(devices))}: type '
            'budget="peak:300 MiB" for the memory of the device'
        )
    now = _measure(model, batch)
    if now is None:
        raise BudgetError(
            f'budget "{budget}" needs to know what the process has in memory, which this system does not say (Linux '
            'does, in /proc/self/status): type budget="peak:300 MiB" for the tensors of a step'
        )
    before = budget.scope.memory
    if before is None:
        return Budget(Process(now), budget.amount)
    grown = now.other_bytes + now.tensor_bytes - before.other_bytes - before.tensor_bytes
    if grown > _GROWN_BYTES:
        warnings.warn(
            f'budget "{budget}" was measured in a process that had {grown >> 20} MiB less in memory than this one: it '
            "may be exceeded by as much. Free what is not needed, or start again with a budget that is measured here",
            TradyWarning,
            stacklevel=2,
        )
    return budget


def _measure(model: nn.Module, batch: Batch) -> ProcessMemory | None:
    returns = make_ready()
    tensors = {id(tensor): tensor for tensor in (*own_parameters(model), *model.buffers(), *batch.tensors)}.values()
    gc.collect()
    trim()
    now = resident()
    if now is None:
        return None
    there = sum(_resident_bytes(tensor) for tensor in tensors if tensor.device.type == "cpu")
    everything = sum(tensor.nbytes for tensor in tensors)
    other = -(-(now.resident_bytes - there) // _GRAIN_BYTES) * _GRAIN_BYTES
    return ProcessMemory(other, everything, GROWTH if returns else GROWTH_WHERE_KEPT)


def _resident_bytes(tensor: Tensor) -> int:
    """Weights that are mapped from a file, or zeros that nothing was written over, are not in memory yet."""
    try:
        return resident_bytes_of(tensor.data_ptr(), tensor.nbytes)
    except (RuntimeError, NotImplementedError):  # made of other tensors, as quantised weights are
        return tensor.nbytes
