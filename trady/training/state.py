"""State as tensors and JSON, the only two ways in which trady stores anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trady.errors import CheckpointError
from trady.records import schema
from trady.records.schema import Natural
from trady.records.versioned import Format

OPTIMIZER = Format(None, "state of the optimizer", CheckpointError, "start the run again with --overwrite")


@dataclass(frozen=True)
class State:
    """The state of something, to be stored.

    Attributes:
        tensors: Tensors under their names.
        meta: Everything else, JSON-able.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _OptimizerRecord:
    """The JSON values of an optimizer's state."""

    scalars: Mapping[str, Any]
    param_groups: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Group:
    """What every parameter group has."""

    params: tuple[Natural, ...]


def optimizer_to_state(optimizer: torch.optim.Optimizer) -> State:
    """Return an optimizer's state; its tensors are named ``<parameter index>/<name>``."""
    given = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in given["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else scalars)[f"{index}/{name}"] = value
    return State(tensors, {"scalars": scalars, "param_groups": given["param_groups"]})


def _alike(own: object, value: object) -> bool:
    """Return whether an option that was read can stand in the place of an optimizer's own."""
    if own is None or value is None:
        return own is None or isinstance(own, bool)
    if isinstance(own, (list, tuple)):
        return isinstance(value, list) and len(own) == len(value) and all(map(_alike, own, value))
    if isinstance(own, (int, float)):
        return isinstance(value, (int, float)) and isinstance(own, bool) == isinstance(value, bool)
    return isinstance(value, type(own))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load a state into an optimizer over parameters of the same shapes.

    Raises:
        CheckpointError: The optimizer is another, or over other parameters.
    """
    record = OPTIMIZER.read(_OptimizerRecord, dict(state.meta))
    values: dict[int, dict[str, Any]] = {}
    with OPTIMIZER.reading():
        for key, value in (*state.tensors.items(), *record.scalars.items()):
            index, name = key.split("/", 1)
            values.setdefault(int(index), {})[name] = value
        for group, own in zip(record.param_groups, optimizer.param_groups, strict=False):
            # What PyTorch adds in later versions has its default there; what is missing otherwise is damage.
            schema.read(_Group, group)
            for name, value in group.items():
                if name in own and name != "params" and not _alike(own[name], value):
                    raise ValueError(f"{name} of a group is {schema.shown(value)}")
    try:
        optimizer.load_state_dict({"state": values, "param_groups": [dict(group) for group in record.param_groups]})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state does not fit this optimizer: {error}") from error
