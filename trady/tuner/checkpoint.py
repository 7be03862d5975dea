"""A tuner's state as tensors and JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trady.errors import CheckpointError

FORMAT, VERSION = "trady-tuner", 1


def checked_meta(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON part of a tuner's state.

    Raises:
        CheckpointError: It is of another format or version, or lacks a part.

    """
    meta = state.get("meta")
    if not isinstance(meta, Mapping) or meta.get("format") != FORMAT or "tensors" not in state:
        raise CheckpointError("this is no state of a trady tuner")
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint is of version {meta.get('version')}, this trady reads version {VERSION}: "
            "go on with the trady that wrote it, or start anew"
        )
    missing = {"structure", "policy", "seed", "selection", "pool", "ranking", "online"} - set(meta)
    if missing:
        raise CheckpointError(f"the checkpoint is damaged: it lacks {', '.join(sorted(missing))}")
    return meta
