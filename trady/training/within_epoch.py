"""Where an epoch stands in its middle: what it has added up so far, as a state of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trady.errors import CheckpointError
from trady.memory import Ledger
from trady.records import schema
from trady.records.schema import Natural
from trady.training.randomness import random_state
from trady.training.state import State

#: Name of the state in a checkpoint; over several processes, of that of the first one.
WITHIN = "epoch"


def state_names(processes: int) -> tuple[str, ...]:
    """The names of the states of each process: their samples and random numbers differ."""
    return (WITHIN, *(f"{WITHIN}-{process}" for process in range(1, processes)))


@dataclass
class EpochSums:
    """What an epoch adds up while it trains.

    Attributes:
        epoch: The epoch, from 0.
        batches: Batches of it that are done.
        steps: Optimizer steps done since the run began.
        examples: Training examples of the epoch.
        loss: Sum of their losses.
        rate: Learning rate of the last step.
        peak_bytes: Highest peak of the measured steps.
        saved_bytes: Most bytes that these kept between forward and backward.
        averaged_bytes: Most bytes of gradients that these averaged over processes.
        averaging_calls: Most collectives that it took.
        seconds: Time that the epoch has taken so far.
        observing_seconds: How much of it the policy's measurements took.
    """

    epoch: Natural
    batches: Natural = 0
    steps: Natural = 0
    examples: Natural = 0
    loss: float = 0.0
    rate: float = 0.0
    peak_bytes: Natural = 0
    saved_bytes: Natural = 0
    seconds: float = 0.0
    observing_seconds: float = 0.0
    averaged_bytes: Natural = 0
    averaging_calls: Natural = 0

    def take(self, ledger: Ledger) -> None:
        """Take in a step that was measured."""
        self.peak_bytes = max(self.peak_bytes, ledger.peak_bytes)
        self.saved_bytes = max(self.saved_bytes, ledger.saved_bytes)
        self.averaged_bytes = max(self.averaged_bytes, ledger.averaged_bytes)
        self.averaging_calls = max(self.averaging_calls, ledger.averaging_calls)

    def to_state(self, random: State | None = None) -> State:
        """Return the sums together with the random numbers that come next: those of now, unless given."""
        random = random or random_state()
        return State(random.tensors, {"sums": asdict(self), "random": dict(random.meta)})

    @classmethod
    def from_state(cls, state: State) -> tuple[EpochSums, State]:
        """Return what :meth:`to_state` was given.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            found = schema.read(_Record, state.meta)
            return found.sums, State(state.tensors, found.random)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint's epoch is damaged ({error}); start the run again with --overwrite"
            ) from error


def shared_by(states: Mapping[str, State], process: int, processes: int) -> tuple[EpochSums, State | None]:
    """Return where the epoch stands for one of the processes that go on, and the random numbers that come next in it.

    Where they are not as many as those that have saved it, the first one goes on from what all of these have added up,
    and one that had no predecessor begins with the epoch's own random numbers.

    Args:
        states: Of each process that has saved it, by its name (:func:`state_names`).
        process: Which one goes on.
        processes: How many do.

    Raises:
        CheckpointError: A state is missing or damaged.
    """
    names = state_names(len(states))
    if missing := set(names) - set(states):
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(sorted(missing))}; start the run again with --overwrite"
        )
    found = [EpochSums.from_state(states[name]) for name in names]
    sums, random = found[process] if process < len(found) else (found[0][0], None)
    if processes == len(found):
        return sums, random
    everything = [each for each, _ in found] if process == 0 else []
    examples, loss = sum(each.examples for each in everything), sum(each.loss for each in everything)
    return replace(sums, examples=examples, loss=loss), random


@dataclass(frozen=True)
class _Record:
    """What the state holds beside its tensors."""

    sums: EpochSums
    random: Mapping[str, Any]
