"""A tuner's state as tensors and JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trady.channels.selection import Selection
from trady.errors import CheckpointError
from trady.interception.armed import Armed
from trady.model.eager import uncompiled_name
from trady.planning.decision import Decision
from trady.planning.spending import Moment
from trady.ranking.online import OnlineRanking
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.records.schema import Natural
from trady.records.tensors import joined
from trady.records.versioned import Format
from trady.tuner.delta import load_changed_tensors
from trady.tuner.draws import Draws, Progress
from trady.tuner.observed import EARLIER, PREFIX, EvidenceState, check_layers
from trady.tuner.seen import PREFIX as SEEN
from trady.tuner.seen import SeenRecord, load_seen, save_seen
from trady.tuner.snapshot import WeightSnapshot

#: The header of a tuner's state.
STATE = Format("trady-tuner", "state of a trady tuner", CheckpointError, "start a new run")


@dataclass(frozen=True)
class _ObservedRecord:
    """What of the evidence is no tensor."""

    kinds: tuple[str, ...]
    batches: Natural
    epoch: int | None


@dataclass(frozen=True)
class _SliceRecord:
    """Channels of a layer whose earlier weights are among the tensors."""

    layer: str
    channels: tuple[Natural, ...]
    outputs: tuple[Natural, ...] | None


@dataclass(frozen=True)
class _Record:
    """The JSON values of a tuner's state."""

    structure: str
    policy: str
    seed: int
    epoch: int
    redraw: int
    steps: Natural
    state_copies: Natural
    pool: tuple[str, ...]
    selection: Mapping[str, Any]
    ranking: dict[str, Any] | None
    online: dict[str, Any] | None
    policy_options: str = ""
    state_factors: tuple[tuple[float, ...], ...] | None = None
    observed: _ObservedRecord | None = None
    earlier: tuple[_SliceRecord, ...] | None = None
    seen: tuple[SeenRecord, ...] = ()


def save_state(
    decision: Decision,
    draws: Draws,
    observed: EvidenceState,
    snapshot: WeightSnapshot | None,
    delta: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return everything a restart needs beside the base model and the optimizer; see :meth:`trady.Tuner.state_dict`."""
    kept, slices = ({}, None) if snapshot is None else snapshot.state()
    earlier = {EARLIER + name: tensor for name, tensor in kept.items()}
    seen, values = save_seen(draws.seen)
    return {
        "tensors": joined(*(("", tensors) for tensors in (delta, observed.tensors(), earlier, values))),
        "meta": {
            **_progress_to_json(decision, draws.progress(), observed),
            "earlier": slices,
            **({"seen": seen} if seen else {}),
        },
    }


def load_state(
    armed: Armed,
    draws: Draws,
    observed: EvidenceState,
    snapshot: WeightSnapshot | None,
    state: Mapping[str, Any],
) -> None:
    """Go on from :func:`save_state`.

    Raises:
        CheckpointError: The state is of another model, policy, seed or version, or damaged.

    """
    decision, progress, meta = _read_progress(draws, observed, state)
    armed.select(Selection())
    try:
        changed = {name: tensor for name, tensor in state["tensors"].items() if not name.startswith((PREFIX, SEEN))}
        touched = load_changed_tensors(armed.model, changed)
    except CheckpointError:
        armed.select(draws.selection)
        raise
    known = meta.get("observed") is not None
    if known:
        observed.evidence, observed.epoch = progress.moment.evidence, progress.observed_epoch
    names = {uncompiled_name(layer.parameter): layer.name for layer in decision.table}
    draws.restore(decision, progress, touched.renamed(names))
    if snapshot is not None and known:
        kept = {k.removeprefix(EARLIER): t for k, t in state["tensors"].items() if k.startswith(EARLIER)}
        snapshot.load(kept, meta.get("earlier"))


def _progress_to_json(decision: Decision, progress: Progress, observed: EvidenceState) -> dict[str, Any]:
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


def _read_progress(
    draws: Draws, observed: EvidenceState, state: Mapping[str, Any]
) -> tuple[Decision, Progress, Mapping[str, Any]]:
    """Read a state without its weights.

    Returns:
        What the decision has become, the progress, and the JSON values that it was read from.
    """
    meta, decision = _checked_meta(state), draws.planned
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
    with STATE.reading():
        progress = _progress(decision, draws.moment, observed, meta, state["tensors"])
        decision, seen = load_seen(decision, meta.get("seen"), state["tensors"])
    if seen or draws.seen:
        progress = replace(progress, seen=seen, moment=decision.fit_to_budget(progress.moment))
    return decision, progress, meta


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
    tensors = state.get("tensors")
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError("this is no state of a trady tuner: it has no tensors")
    STATE.read(_Record, meta)
    return meta
