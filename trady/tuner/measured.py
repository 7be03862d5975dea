"""A step of an armed model, measured by the ledger."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from trady.interception.armed import Armed
from trady.memory import Ledger, measure
from trady.optim.in_backward import UpdatesInBackward
from trady.tuner.adoption import Optimizers
from trady.tuner.reduction import Reduction
from trady.tuner.snapshot import WeightSnapshot


def measured_step(
    step: Callable[[], object],
    armed: Armed,
    attached: Optimizers,
    snapshot: WeightSnapshot | None,
    reduction: Reduction,
    *,
    inference: bool,
    untouched: Callable[[], AbstractContextManager[None]],
) -> Ledger:
    """Do what :meth:`trady.Tuner.ledger` does."""
    compact = [layer.compact for layer in armed.layers.values()]
    before = reduction.traffic
    ledger = measure(
        step,
        armed.model,
        inference=inference,
        compact=[*compact, *armed.indices, *(() if snapshot is None else snapshot.tensors)],
        early=[optimizer for optimizer in attached() if isinstance(optimizer, UpdatesInBackward)],
        untouched=untouched,
    )
    return ledger.averaging(reduction.traffic - before)
