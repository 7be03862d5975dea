"""What training has changed, as plain tensors: the selected channels of each weight and the whole head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trady.channels import ChannelTable
from trady.errors import CheckpointError
from trady.ops.selected import channel_major

_CHANNELS, _VALUES, _GROUPS, _WHOLE = "::channels", "::values", "::groups", "::whole"

#: ``groups`` of a weight that is stored input-major, [in, out].
_INPUT_MAJOR = 0


def changed_tensors(
    model: nn.Module,
    table: ChannelTable,
    touched: Mapping[str, Iterable[int]],
    head: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """Copy the channels that were ever selected, and the head.

    Returns:
        For every weight ``name::channels`` (int64 [n]), ``name::values`` ([n, output channels a group,
        *kernel]) and ``name::groups``; for every parameter of the head ``name::whole``.

    """
    tensors: dict[str, Tensor] = {}
    for layer in table:
        channels = sorted(touched.get(layer.name, ()))
        if not channels:
            continue
        weight = model.get_parameter(layer.parameter).detach()
        index = torch.tensor(channels, dtype=torch.int64)
        groups = _INPUT_MAJOR if layer.kind == "addmm" else layer.groups
        tensors[layer.parameter + _CHANNELS] = index
        tensors[layer.parameter + _VALUES] = _rows(weight, groups)[_place(weight, groups, index)].contiguous().clone()
        tensors[layer.parameter + _GROUPS] = torch.tensor([groups], dtype=torch.int64)
    for name, parameter in head.items():
        tensors[name + _WHOLE] = parameter.detach().clone().contiguous()
    return tensors


def apply_delta(model: nn.Module, delta: Mapping[str, Tensor]) -> nn.Module:
    """Write a delta into the base model it was trained from.

    Args:
        model: The base model; changed in place.
        delta: The tensors of ``Tuner.delta()``, or of ``delta.safetensors``.

    Returns:
        The same model, now the fine-tuned one.

    Raises:
        CheckpointError: The delta is of another model, or damaged; the model is left as it was.

    """
    load_changed_tensors(model, delta)
    return model


def load_changed_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, set[int]]:
    """Write changed tensors into a model, all or nothing; return the channels of each weight."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched: dict[str, set[int]] = {}
    writes: list[tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor]] = []
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("::")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the delta changes {name or key!r}, which this {type(model).__name__} does not have")
        if part == "whole":
            _check_shape(name, tensor.shape, parameter.shape)
            writes.append((parameter, None, tensor))
        elif part == "channels":
            values, groups = tensors.get(name + _VALUES), tensors.get(name + _GROUPS)
            if values is None or groups is None:
                raise CheckpointError(f"the delta is damaged: {name!r} has channels but no values")
            count = int(groups)
            if parameter.dim() < 2 or count < 0 or (count and parameter.shape[0] % count):
                raise CheckpointError(f"the delta has {count} groups for {name!r} of shape {tuple(parameter.shape)}")
            rows = _rows(parameter.detach(), count)
            total = rows.shape[0] * rows.shape[1]
            if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < total):
                raise CheckpointError(f"the delta changes channel {int(tensor.max())} of {name!r}, which has {total}")
            _check_shape(name, values.shape, torch.Size((tensor.numel(), *rows.shape[2:])))
            writes.append((rows, _place(parameter, count, tensor), values))
            touched[name] = set(tensor.tolist())
        elif part not in ("values", "groups"):
            raise CheckpointError(f"the delta holds {key!r}, which is no part of a trady delta")
    with torch.no_grad():
        for target, place, values in writes:
            if place is None:
                target.copy_(values)
            else:
                target[place] = values.to(target.dtype).to(target.device)
    return touched


def _rows(weight: Tensor, groups: int) -> Tensor:
    return channel_major(weight, "addmm" if groups == _INPUT_MAJOR else "conv", max(groups, 1))


def _place(weight: Tensor, groups: int, index: Tensor) -> tuple[Tensor, Tensor]:
    a_group = _rows(weight, groups).shape[1]
    return index // a_group, index % a_group


def _check_shape(name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise CheckpointError(f"the delta has {tuple(found)} for {name!r}, this model needs {tuple(expected)}")
