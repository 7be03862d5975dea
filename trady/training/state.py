"""State as tensors and JSON, the only two ways in which trady stores anything."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
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


#: Options that every version of an optimizer has written; a record without them is damaged.
_ALWAYS = ("lr", "momentum", "betas", "eps", "weight_decay")

#: State that is smaller than its parameter: means of rows and columns.
_FACTORS = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")


def _checked(group: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group; those that later versions of an optimizer have are its own."""
    if missing := [name for name in _ALWAYS if name in own and name not in group]:
        raise ValueError(f"a group lacks {', '.join(missing)}")
    for name, value in group.items():
        if name in own and name != "params" and not _alike(own[name], value):
            raise ValueError(f"{name} of a group is {schema.shown(value)}")
    return {**{name: value for name, value in own.items() if name != "params"}, **group}


def _alike(own: object, value: object) -> bool:
    """Return whether an option that was read can stand in the place of an optimizer's own."""
    if own is None or value is None:
        return own is None or isinstance(own, bool)
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(own) == len(value) and all(map(_alike, own, value))
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(value, torch.Tensor) or schema.read(float, value) is not None
    return isinstance(value, type(own))


def _check_ranges(group: Mapping[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    """Have an optimizer of PyTorch's check its options itself, as it does when it is made."""
    if kind.__module__.startswith("torch.optim."):
        taken = {name: group[name] for name in inspect.signature(kind).parameters if name in group and name != "params"}
        kind([torch.zeros(1)], **taken)


def _check_shapes(
    values: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> None:
    """Refuse the state of other parameters, which a step would fail with."""
    numbers = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {number: parameter.shape for number, parameter in zip(numbers, parameters, strict=True)}
    dtypes = {number: parameter.dtype for number, parameter in zip(numbers, parameters, strict=True)}
    alike: dict[int, set[str]] = {}
    for number, state in values.items():
        if number not in shapes:
            raise ValueError(f"it has a state of parameter {number}, which is in no group")
        if set(state) != alike.setdefault(min(len(shapes[number]), 2), set(state)):
            raise ValueError(f"the state of parameter {number} lacks what others have, or has more")
        for name, value in state.items():
            whole = isinstance(value, torch.Tensor) and value.dim() > 0 and name not in _FACTORS
            if isinstance(value, torch.Tensor) and value.is_complex() and not dtypes[number].is_complex:
                raise ValueError(f"{name} of parameter {number} is {value.dtype}")
            if whole and value.numel() > 1 and value.shape != shapes[number]:
                raise ValueError(f"{name} of parameter {number} is {list(value.shape)}, not {list(shapes[number])}")


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load a state into an optimizer over parameters of the same shapes.

    Raises:
        CheckpointError: The optimizer is another, or over other parameters.
    """
    record = OPTIMIZER.read(_OptimizerRecord, dict(state.meta))
    values: dict[int, dict[str, Any]] = {}
    with OPTIMIZER.reading():
        there = [len(schema.read(_Group, group).params) for group in record.param_groups]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if there != here:
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit this optimizer: its groups have {there} parameters, these {here}"
        )
    with OPTIMIZER.reading():
        for key, value in (*state.tensors.items(), *record.scalars.items()):
            index, name = key.split("/", 1)
            values.setdefault(int(index), {})[name] = value
        groups = [_checked(group, own) for group, own in zip(record.param_groups, optimizer.param_groups, strict=True)]
        for group in groups:
            _check_ranges(group, type(optimizer))
        _check_shapes(values, groups, optimizer)
    try:
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state does not fit this optimizer: {error}") from error
