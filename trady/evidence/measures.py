"""What can be measured for a policy, by name. A new measure is one class, registered in ``trady/evidence/__init__.py``.

A policy names the kinds it looks at (:class:`trady.policies.Needs`); ``Tuner.observe`` measures them inside the
budget, and the next draw has them as :class:`trady.policies.Evidence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from trady.errors import PolicyError, StateError
from trady.evidence.sweeps import Sweeper
from trady.interception.armed import Armed
from trady.model.batch import Batch, Loss
from trady.policies.evidence import Evidence, Needs, Values
from trady.process.ranks import average_, processes


@dataclass(frozen=True)
class Measured:
    """What one measure found.

    Attributes:
        values: Layer name to one number a channel.
        carried: Arrays that the same measure wants back next time (``before.carried``), under names that
            begin with its kind.
        batches: Batches that it looked at.
    """

    values: Values
    carried: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    batches: int = 0


@dataclass(frozen=True)
class MeasureContext:
    """What a measure works with.

    Attributes:
        armed: The armed model.
        sweeper: Runs batches through it, in sweeps that fit in the budget, with room for this many numbers a channel
            beside its activations, or for its weight gradient if that is larger.
        batches: Pairs (inputs, targets), or mappings that the model computes a loss from.
        loss: From (outputs, targets) to a scalar; ``None`` for the model's own.
        before: What was measured before; ``None`` the first time.
        earlier: Context in which the model has the weights of back then, for measures with ``needs_snapshot``.
        room: Bytes that a budget leaves beside an inference pass on a batch.
    """

    armed: Armed
    sweeper: Callable[[int], Sweeper]
    batches: Iterable[Any]
    loss: Loss | None
    before: Evidence | None
    earlier: Callable[[], AbstractContextManager[None]] = nullcontext
    room: Callable[[Batch], float] = lambda batch: math.inf


class Measure(Protocol):
    """One kind of evidence.

    Optional is the attribute ``needs_snapshot`` (true: the weights that train are kept from one measurement to the
    next, in the budget, for :attr:`MeasureContext.earlier`).
    """

    #: Whether it looks at data; without, the tuner measures when the model is prepared.
    needs_batches: bool

    def __call__(self, bench: MeasureContext) -> Measured:
        """Measure; the model is left as it was found."""


_measures: dict[str, Measure] = {}


def register_measure(kind: str, measure: Measure) -> None:
    """Make a measure known.

    Raises:
        PolicyError: There is one of that name.

    """
    if kind in _measures:
        raise PolicyError(f"a measure {kind!r} exists already; choose another name")
    _measures[kind] = measure


def check_needs(needs: Needs) -> None:
    """Refuse kinds that nothing measures.

    Raises:
        PolicyError: It lists those that exist.

    """
    for kind in needs.kinds:
        if kind not in _measures:
            raise PolicyError(f"nothing measures {kind!r}; there are {', '.join(sorted(_measures))}")


def needs_batches(needs: Needs) -> bool:
    """Whether any of the kinds looks at data."""
    check_needs(needs)
    return any(_measures[kind].needs_batches for kind in needs.kinds)


def needs_snapshot(needs: Needs) -> bool:
    """Whether any of the kinds compares with the weights of the measurement before."""
    check_needs(needs)
    return any(getattr(_measures[kind], "needs_snapshot", False) for kind in needs.kinds)


def gather_evidence(needs: Needs, bench: MeasureContext) -> Evidence:
    """Measure all that a policy needs, the same on every rank.

    Raises:
        StateError: There was no batch.

    """
    check_needs(needs)
    several = sum(_measures[kind].needs_batches for kind in needs.kinds) > 1
    shared = replace(bench, batches=list(bench.batches)) if several else bench
    values: dict[str, Values] = {}
    carried: dict[str, npt.NDArray[Any]] = {}
    batches = 0
    for kind in needs.kinds:
        found = _measures[kind](shared)
        if _measures[kind].needs_batches and not found.batches:
            raise StateError("there is no batch to observe; pass at least one (inputs, targets) pair")
        values[kind] = _averaged(found.values)
        carried.update(found.carried)
        batches = max(batches, found.batches)
    return Evidence(values, carried, batches)


def _averaged(values: Values) -> Values:
    """Average over ranks, as gradients are; layers come in the order of the table."""
    if processes() == 1:
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensors = {name: torch.from_numpy(np.array(array)).to(device) for name, array in values.items()}
    average_(list(tensors.values()))
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
