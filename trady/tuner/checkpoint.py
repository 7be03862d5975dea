"""A tuner's state as tensors and JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trady.errors import CheckpointError
from trady.records.versioned import Format

FORMAT, VERSION = "trady-tuner", 1

_STATE = Format(FORMAT, "state of a trady tuner", CheckpointError, "start again", version=VERSION)


def checked_meta(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON part of a tuner's state.

    Raises:
        CheckpointError: It is of another format or version, or lacks a part.

    """
    meta = _STATE.check(state.get("meta"))
    if "tensors" not in state:
        raise CheckpointError("this is no state of a trady tuner: it has no tensors")
    missing = {"structure", "policy", "seed", "selection", "pool", "ranking", "online"} - set(meta)
    if missing:
        raise CheckpointError(f"the checkpoint is damaged: it lacks {', '.join(sorted(missing))}")
    return meta
