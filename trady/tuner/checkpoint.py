"""A tuner's state as tensors and JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trady.channels.selection import Selection
from trady.errors import CheckpointError
from trady.planning.decision import Decision
from trady.planning.spending import Moment
from trady.ranking.online import OnlineRanking
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.records.versioned import Format
from trady.tuner.observed import EvidenceState, check_layers

#: The header of a tuner's state.
STATE = Format("trady-tuner", "state of a trady tuner", CheckpointError, "start a new run")

_REQUIRED = {"structure", "policy", "seed", "selection", "pool", "ranking", "online"}


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a training has come, beside its weights.

    Attributes:
        moment: What draws depend on.
        selection: The channels that train.
        online: The ranking that is being learnt.
        epoch: The epoch that was drawn last.
        redraw: Draws inside of it.
        steps: Optimizer steps that the ranking has seen.
        observed_epoch: The epoch that was drawn from the evidence; ``None`` while it is fresh.
    """

    moment: Moment
    selection: Selection
    online: OnlineRanking | None
    epoch: int
    redraw: int
    steps: int
    observed_epoch: int | None = None


def progress_to_json(decision: Decision, progress: Progress, observed: EvidenceState) -> dict[str, Any]:
    """Return the JSON part of a tuner's state; :func:`read_progress` reads it."""
    moment = progress.moment
    return {
        **STATE.header(),
        "structure": structure_digest(decision.table),
        "policy": decision.policy.name,
        "policy_options": decision.options,
        "seed": decision.seed,
        "epoch": progress.epoch,
        "redraw": progress.redraw,
        "steps": progress.steps,
        **moment.optimizer.state(),
        "pool": list(moment.pool),
        "selection": progress.selection.to_json(),
        "ranking": None if moment.ranking is None else moment.ranking.to_json(),
        "online": None if progress.online is None else progress.online.to_json(),
        "observed": observed.meta(),
    }


def read_progress(
    decision: Decision, moment: Moment, observed: EvidenceState, state: Mapping[str, Any]
) -> tuple[Progress, Mapping[str, Any]]:
    """Read a tuner's state, without its weights.

    Args:
        decision: What was decided for this model.
        moment: The moment of now.
        observed: Reads the evidence.
        state: ``tensors`` and ``meta``, as :meth:`trady.Tuner.state_dict` gives them.

    Returns:
        The progress, and the JSON values it was read from.

    Raises:
        CheckpointError: It is of another model, policy, seed or version, or damaged.

    """
    meta = _checked_meta(state)
    for what, given, wanted in (
        ("model structure", meta["structure"], structure_digest(decision.table)),
        ("policy", meta["policy"], decision.policy.name),
        ("policy options", meta.get("policy_options", ""), decision.options),
        ("seed", meta["seed"], decision.seed),
    ):
        if given != wanted:
            raise CheckpointError(
                f"the checkpoint is of {what} {given!r}, this run of {wanted!r}; start a new run for it"
            )
    try:
        return _progress(decision, moment, observed, meta, state["tensors"]), meta
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is damaged ({error}); use an older one or start a new run") from error


def _progress(
    decision: Decision,
    moment: Moment,
    observed: EvidenceState,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Progress:
    table = decision.table
    selection = Selection.from_json(meta["selection"])
    if (mistake := table.mistake(selection)) is not None:
        raise ValueError(mistake)
    ranking = None if meta["ranking"] is None else LayerRanking.from_json(meta["ranking"])
    online = None if meta["online"] is None else OnlineRanking.from_json(meta["online"], table)
    pool = tuple(table[name].name for name in meta["pool"])
    epoch, redraw, steps = (int(meta[key]) for key in ("epoch", "redraw", "steps"))
    optimizer = moment.optimizer.with_state(meta)
    evidence, observed_epoch = observed.read(meta.get("observed"), tensors)
    if evidence is not None:
        check_layers(evidence, table)
    learns = online is not None
    moment = replace(moment, pool=pool, ranking=ranking, learns=learns, optimizer=optimizer)
    if evidence is not None:
        moment = replace(moment, evidence=evidence)
    return Progress(moment, selection, online, epoch, redraw, steps, observed_epoch)


def _checked_meta(state: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = STATE.check(state.get("meta"))
    if "tensors" not in state:
        raise CheckpointError("this is no state of a trady tuner: it has no tensors")
    if missing := _REQUIRED - set(meta):
        raise CheckpointError(f"the checkpoint is damaged: it lacks {', '.join(sorted(missing))}")
    return meta
