"""Where an epoch stands in its middle: what it has added up so far, as a state of the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from trady.errors import CheckpointError
from trady.training.randomness import random_state
from trady.training.state import State

#: Name of the state in a checkpoint.
WITHIN = "epoch"


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
        seconds: Time that the epoch has taken so far.
        observing_seconds: How much of it the policy's measurements took.
    """

    epoch: int
    batches: int = 0
    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    rate: float = 0.0
    peak_bytes: int = 0
    saved_bytes: int = 0
    seconds: float = 0.0
    observing_seconds: float = 0.0

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
            found: dict[str, Any] = dict(state.meta["sums"])
            known = {field.name for field in fields(cls)}
            sums = cls(**{key: value for key, value in found.items() if key in known})
            return sums, State(state.tensors, state.meta["random"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's epoch is damaged ({error}); start the run again with --overwrite"
            ) from error
