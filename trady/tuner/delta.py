"""What training has changed, as plain tensors: the selected channels of each weight and the whole head."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trady.channels.selection import Channels, Selection
from trady.channels.table import ChannelTable, Layer
from trady.errors import CheckpointError
from trady.model.eager import uncompiled_name
from trady.ops.quantized import is_quantized
from trady.ops.selected import channel_major, select_channels
from trady.quantized.linear import QuantizedLinear, layer_at
from trady.records.tensors import LazyTensors, Outline
from trady.records.versioned import Format

_CHANNELS, _VALUES, _GROUPS, _WHOLE = "::channels", "::values", "::groups", "::whole"

_OUTPUTS = "::outputs"

FORMAT = Format(None, "delta", CheckpointError, "take delta.safetensors from a run folder, or train again")

#: ``groups`` of a weight that is stored input-major, [in, out].
_INPUT_MAJOR = 0


def changed_tensors(
    model: nn.Module,
    table: ChannelTable,
    touched: Selection,
    head: Mapping[str, nn.Parameter],
) -> LazyTensors:
    """The channels that were ever selected (of quantised layers those that have trained), and the head, as copies.

    Each is copied when it is asked for.

    Returns:
        Under the names of the uncompiled model: for every weight ``name::channels`` (int64 [n]),
        ``name::values`` ([n, output channels a group, *kernel]) and ``name::groups``; where only some output
        channels were selected ``name::outputs`` (int64 [m]), which the values are of; for every parameter of
        the head ``name::whole``.

    """
    found: dict[str, Outline] = {}
    for layer in table:
        if layer.name not in touched:
            continue
        index, outputs = torch.tensor(_changed(model, layer, touched[layer.name])), None
        if not len(index):
            continue
        name = uncompiled_name(layer.parameter)
        if layer.name in touched.outputs:
            outputs = torch.tensor(touched.outputs[layer.name])
            found[name + _OUTPUTS] = Outline.of(outputs)
        groups = _INPUT_MAJOR if layer.kind == "addmm" else layer.groups
        found[name + _CHANNELS] = Outline.of(index)
        found[name + _VALUES] = _values(model, layer.parameter, groups, index, outputs)
        found[name + _GROUPS] = Outline.of(torch.tensor([groups], dtype=torch.int64))
    for name, parameter in head.items():
        whole = partial(_whole, parameter)
        found[uncompiled_name(name) + _WHOLE] = Outline(tuple(parameter.shape), parameter.dtype, whole)
    return LazyTensors(found)


def _values(model: nn.Module, parameter: str, groups: int, index: Tensor, outputs: Tensor | None) -> Outline:
    layer = _layer(model, parameter)
    # Of a quantised layer the type is asked for, and the shape is known: nothing is dequantised.
    like = model.get_parameter(parameter) if layer is None else layer.empty()
    weight = like.detach() if layer is None else torch.empty(layer.shape, dtype=like.dtype, device="meta")
    rows = _rows(weight, groups)
    shape = (len(index), *rows.shape[2:]) if outputs is None else (len(index), len(outputs), *rows.shape[3:])

    def copied() -> Tensor:
        now = _weight(model, parameter)
        return _rows(now, groups)[_place(now, groups, index, outputs)].contiguous()

    return Outline(tuple(shape), weight.dtype, copied)


def _whole(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().clone().contiguous()


def apply_delta(model: nn.Module, delta: Mapping[str, Tensor] | str | os.PathLike[str]) -> nn.Module:
    """Write a delta into the base model it was trained from.

    Args:
        model: The base model; changed in place. It may be stored quantised where the delta was trained in floating
            point, or the other way round: a delta holds whole channels, which a quantised layer keeps in floating
            point beside its weight.
        delta: The tensors of ``Tuner.delta()``, or the file ``delta.safetensors`` of a run.

    Returns:
        The same model, now the fine-tuned one.

    Raises:
        CheckpointError: The delta is of another model, damaged, or cannot be read; the model is left as it was.

    """
    if isinstance(delta, Mapping):
        load_changed_tensors(model, delta)
        return model
    tensors = FORMAT.read_tensors(delta)
    with FORMAT.named(delta):
        load_changed_tensors(model, tensors)
    return model


def load_changed_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Selection:
    """Write changed tensors into a model, all or nothing; return the channels under the names of the weights."""
    parameters = {uncompiled_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    touched: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    writes: list[Callable[[], object]] = []
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("::")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the delta changes {name or key!r}, which this {type(model).__name__} does not have")
        layer = _layer(model, name)
        if part == "whole":
            if not tensor.is_floating_point():
                raise CheckpointError(f"the delta is damaged: {name!r} is {tensor.dtype}")
            if is_quantized(parameter):
                raise CheckpointError(
                    f"the delta changes all of {name!r}, which this model stores quantised: apply it to a base in "
                    "floating point (trady.dequantize)"
                )
            _check_shape(name, tensor.shape, parameter.shape)
            writes.append(partial(parameter.copy_, tensor))
        elif part == "channels":
            values, groups = tensors.get(name + _VALUES), tensors.get(name + _GROUPS)
            if values is None or groups is None:
                raise CheckpointError(f"the delta is damaged: {name!r} has channels but no values")
            if groups.numel() != 1 or groups.dtype != torch.int64 or not values.is_floating_point():
                kinds = f"{values.dtype} values and {groups.dtype} groups"
                raise CheckpointError(f"the delta is damaged: {name!r} has {kinds}")
            count = int(groups)
            weight = parameter.detach() if layer is None else torch.empty(layer.shape, device="meta")
            if weight.dim() < 2 or count < 0 or (count and weight.shape[0] % count):
                raise CheckpointError(f"the delta has {count} groups for {name!r} of shape {tuple(weight.shape)}")
            rows = _rows(weight, count)
            _check_range(name, "channel", tensor, rows.shape[0] * rows.shape[1])
            outputs, expected = tensors.get(name + _OUTPUTS), list(rows.shape[2:])
            if outputs is not None:
                if count > 1:
                    raise CheckpointError(f"the delta is damaged: {name!r} has output channels and {count} groups")
                _check_range(name, "output channel", outputs, rows.shape[2])
                expected[0], chosen[name] = outputs.numel(), outputs.cpu().numpy()
            _check_shape(name, values.shape, torch.Size((tensor.numel(), *expected)))
            if layer is not None:
                selected = select_channels(tensor.cpu().numpy(), 1, layer.shape[1], parameter.device, chosen.get(name))
                writes.append(partial(layer.scatter_, selected, values.to(parameter.device)))
            else:
                writes.append(partial(_write, rows, _place(weight, count, tensor, outputs), values))
            touched[name] = tensor.cpu().numpy()
        elif part not in ("values", "groups", "outputs"):
            raise CheckpointError(f"the delta holds {key!r}, which is no part of a trady delta")
        elif name + _CHANNELS not in tensors:
            raise CheckpointError(f"the delta is damaged: {name!r} has {part} but no channels")
    with torch.no_grad():
        for write in writes:
            write()
    return Selection(touched, chosen)


def _layer(model: nn.Module, parameter: str) -> QuantizedLinear | None:
    """What computes the quantised layer that a weight belongs to; ``None`` for any other weight."""
    owner, _, attribute = parameter.rpartition(".")
    return layer_at(model.get_submodule(owner)) if attribute == "weight" else None


def _changed(model: nn.Module, layer: Layer, touched: Channels) -> Channels:
    quantized = _layer(model, layer.parameter)
    if quantized is None:
        return touched
    found = quantized.channels
    return touched[:0] if found is None else np.intersect1d(touched, found[0].cpu().numpy())


def _weight(model: nn.Module, parameter: str) -> Tensor:
    layer = _layer(model, parameter)
    return model.get_parameter(parameter).detach() if layer is None else layer.dense()


def _write(target: Tensor, place: tuple[Tensor, ...], values: Tensor) -> None:
    target[place] = values.to(target.dtype).to(target.device)


def _rows(weight: Tensor, groups: int) -> Tensor:
    return channel_major(weight, "addmm" if groups == _INPUT_MAJOR else "conv", max(groups, 1))


def _place(weight: Tensor, groups: int, index: Tensor, outputs: Tensor | None) -> tuple[Tensor, ...]:
    a_group = _rows(weight, groups).shape[1]
    if outputs is None:
        return index // a_group, index % a_group
    return (index // a_group).unsqueeze(1), (index % a_group).unsqueeze(1), outputs


def _check_range(name: str, what: str, index: Tensor, total: int) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise CheckpointError(f"the delta is damaged: {what}s of {name!r} are {index.dim()}-dimensional {index.dtype}")
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < total):
        wrong = int(index.max()) if int(index.max()) >= total else int(index.min())
        raise CheckpointError(f"the delta changes {what} {wrong} of {name!r}, which has {total}")


def _check_shape(name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise CheckpointError(f"the delta has {tuple(found)} for {name!r}, this model needs {tuple(expected)}")
