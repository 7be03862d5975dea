"""What was asked for, read and checked."""

from __future__ import annotations

from dataclasses import dataclass

from trady.planning.budget import Budget
from trady.policies import Policy
from trady.ranking.ranking import LayerRanking
from trady.simulation.simulator import ExampleLoss


@dataclass(frozen=True)
class Rules:
    """What a user asked for, read and checked (:class:`trady.planning.request.Request`).

    Attributes:
        budget: What may be spent; ``None`` is anything.
        policy: Draws the channels.
        ranking: Which layers are worth updating: a ranking or a word (:func:`trady.ranking.priors.ranking_for`).
        pool: The layers of an earlier plan, instead of those that the ranking names.
        seed: Seed of the draws.
        fuse: Whether calls are computed together.
        recompute: What the backward pass computes anew (:data:`trady.planning.recomputation.MODES`).
        fidelity: How exactly smooth activations are differentiated (:data:`trady.ops.smooth.FIDELITIES`).
        loss: What the step makes of the output, if it is told.
    """

    budget: Budget | None
    policy: Policy
    ranking: LayerRanking | str | None = None
    pool: tuple[str, ...] | None = None
    seed: int = 0
    fuse: bool = True
    recompute: str = "auto"
    fidelity: str = "exact"
    loss: ExampleLoss | None = None
