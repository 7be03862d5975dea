"""The state of an optimizer as it was written, checked against the optimizer that it is for.

PyTorch takes over whatever it is given, and fails in the next step. Its optimizers know best what they can have: their
constructors check options, and a step with a tiny parameter shows what they keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trady.errors import CheckpointError
from trady.records import schema
from trady.records.schema import Natural
from trady.records.versioned import Format

OPTIMIZER = Format(None, "state of the optimizer", CheckpointError, "start the run again with --overwrite")

#: Options that every version of an optimizer has written; a record without them is damaged.
_ALWAYS = ("lr", "momentum", "betas", "eps", "weight_decay")

#: State that is smaller than its parameter: means of rows and columns.
_FACTORS = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")

#: Steps are counted in floating point, which holds whole numbers up to this one.
_MOST_STEPS = 2**53

Groups = list[dict[str, Any]]

Values = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class _Record:
    """The JSON values of an optimizer's state."""

    scalars: Mapping[str, Any]
    param_groups: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Group:
    """What every parameter group has."""

    params: tuple[Natural, ...]


def read_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> tuple[Groups, Values]:
    """Return the parameter groups and the state of each parameter, as an optimizer loads them.

    Args:
        optimizer: The optimizer that the state is for.
        tensors: Named ``<parameter index>/<name>``.
        meta: The other values, and the groups.

    Raises:
        CheckpointError: They are damaged, or of an optimizer over other parameters.
    """
    record = OPTIMIZER.read(_Record, dict(meta))
    with OPTIMIZER.reading():
        there = [len(schema.read(_Group, group).params) for group in record.param_groups]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if there != here:
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit this optimizer: its groups have {there} parameters, "
            f"and there are {here}"
        )
    values: Values = {}
    with OPTIMIZER.reading():
        for key, value in (*tensors.items(), *record.scalars.items()):
            index, name = key.split("/", 1)
            values.setdefault(int(index), {})[name] = value
        groups = [_checked(group, own) for group, own in zip(record.param_groups, optimizer.param_groups, strict=True)]
        _check_state(values, groups, optimizer)
    return groups, values


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
    if own is None:  # such as fused, which PyTorch decides, or a rate that the optimizer finds by itself
        return value is None or isinstance(value, bool) or _alike(0.0, value)
    if value is None:
        return isinstance(own, bool)
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(own) == len(value) and all(map(_alike, own, value))
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(value, Tensor) or schema.read(float, value) is not None
    return isinstance(value, type(own))


def _check_state(values: Values, groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Refuse options and state that a step would fail with."""
    parameters: dict[int, tuple[Tensor, Mapping[str, Any]]] = {}
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for parameter in own["params"][:1]:
            _kept(type(optimizer), group, parameter)
        parameters.update({number: (p, group) for number, p in zip(group["params"], own["params"], strict=True)})
    for number, state in values.items():
        if number not in parameters:
            raise ValueError(f"it has a state of parameter {number}, which is in no group")
        parameter, group = parameters[number]
        kept = _kept(type(optimizer), group, parameter) or {}
        if missing := set(kept) - set(state):
            raise ValueError(f"the state of parameter {number} lacks {', '.join(sorted(missing))}")
        for name, value in state.items():
            _check_value(f"{name} of parameter {number}", value, parameter, kept.get(name), name in _FACTORS)


def _check_value(what: str, value: object, parameter: Tensor, kept: object, factor: bool) -> None:
    if isinstance(kept, Tensor) and value is not None and not isinstance(value, Tensor):
        raise ValueError(f"{what} is {schema.shown(value)}, not a tensor")
    if not isinstance(value, Tensor) or factor:
        return
    if value.is_complex() and not parameter.is_complex():
        raise ValueError(f"{what} is {value.dtype}")
    single, whole = value.numel() == 1, value.shape == parameter.shape
    if isinstance(kept, Tensor):
        single, whole = single and kept.dim() == 0, whole and (kept.dim() > 0 or not parameter.dim())
    if not (single or whole):
        raise ValueError(f"{what} is {list(value.shape)}, and the parameter {list(parameter.shape)}")
    if what.startswith("step ") and single and not 0 <= float(value) <= _MOST_STEPS:
        raise ValueError(f"{what} is {float(value)}")


def _kept(kind: type[torch.optim.Optimizer], group: Mapping[str, Any], like: Tensor) -> dict[str, Any] | None:
    """Return what an optimizer of PyTorch's keeps of a small parameter like another; ``None`` if that is unknown.

    Raises:
        ValueError: An option is out of range, or not possible on this device.
    """
    if not kind.__module__.startswith("torch.optim."):
        return None
    options = {name: group[name] for name in inspect.signature(kind).parameters if name in group and name != "params"}
    parameter = torch.nn.Parameter(like.detach().new_zeros((2,) * like.dim()))
    optimizer = kind([parameter], **options)
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except AssertionError as error:  # options that go together on other devices only
        raise ValueError(error) from error
    except (RuntimeError, TypeError):  # it wants sparse gradients, or a function to call
        return None
    return dict(optimizer.state[parameter])
