"""Where an epoch stands in its middle: what it has added up so far, as a state of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class _Record:
    """What the state holds beside its tensors."""

    sums: EpochSums
    random: Mapping[str, Any]
