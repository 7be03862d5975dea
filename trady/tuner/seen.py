"""Steps that a loop has been seen to do and that the draws leave room for, and how they go through a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trady.errors import CheckpointError, ModelError
from trady.model.batch import Batch, PackedBatch
from trady.model.untouched import apart
from trady.planning.conditions import Conditions, shapes_of
from trady.planning.decision import Decision
from trady.records.schema import Natural, read

#: Tensors of a state that hold ids and masks of what was seen begin with it; no parameter of a model can.
PREFIX = "@seen/"


@dataclass(frozen=True, eq=False)
class Seen:
    """A step that was not planned.

    Attributes:
        conditions: What it does.
        batches: What its forward passes got: shapes, and the values of ids and masks.
        waiting: Bytes of a larger batch that wait meanwhile.
    """

    conditions: Conditions
    batches: tuple[PackedBatch, ...]
    waiting: int

    def allowed_by(self, decision: Decision) -> Decision:
        """Return the decision whose draws leave room for it."""
        batches = [packed.unpack() for packed in self.batches]
        return decision.allowing(decision.case(batches, self.conditions, self.waiting))


@dataclass(frozen=True)
class SeenRecord:
    """The JSON values of a step that was seen."""

    accumulates: bool
    autocast: str | None
    waiting: Natural
    batches: tuple[Any, ...]


@dataclass(frozen=True)
class _TensorRecord:
    """A tensor without values, or the name of one with values."""

    dtype: str
    shape: tuple[Natural, ...]
    stride: tuple[Natural, ...]
    values: str | None = None


def save_seen(seen: tuple[Seen, ...]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return what was seen as JSON values and tensors; without batches that hold objects of a person's own classes."""
    records: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for each in seen:
        values: dict[str, Tensor] = {}
        try:
            batches = [_written(packed.unpack().inputs, f"{PREFIX}{len(records)}/", values) for packed in each.batches]
        except TypeError:
            continue
        found = each.conditions
        autocast = None if found.autocast is None else _name_of(found.autocast)
        records.append(
            {"accumulates": found.accumulates, "autocast": autocast, "waiting": each.waiting, "batches": batches}
        )
        tensors.update(values)
    return records, tensors


def load_seen(
    decision: Decision, records: list[Any] | None, tensors: Mapping[str, Tensor]
) -> tuple[Decision, tuple[Seen, ...]]:
    """Read what :func:`save_seen` gave; return the decision that leaves room for it as well.

    Raises:
        CheckpointError: The model cannot be called like that.
        ValueError: It is damaged.
    """
    found = []
    model = decision.loop.model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for value in records or ():
        record = read(SeenRecord, value)
        batches = [Batch(_read(each, tensors, device)) for each in record.batches]
        autocast = None if record.autocast is None else _dtype(record.autocast)
        conditions = Conditions(tuple(map(shapes_of, batches)), record.accumulates, autocast)
        found.append(Seen(conditions, tuple(batch.packed for batch in batches), record.waiting))
    try:
        with apart(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for each in found:
                decision = each.allowed_by(decision)
    except ModelError as error:
        raise CheckpointError(f"the checkpoint has seen a step that this model cannot do: {error}") from error
    return decision, tuple(found)


def _written(value: Any, prefix: str, values: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise TypeError(value.layout)
        name = None if value.is_meta else f"{prefix}{len(values)}"
        if name is not None:
            values[name] = value.detach().cpu().contiguous()
        shape, stride = list(value.shape), list(value.stride())
        return {"tensor": {"dtype": _name_of(value.dtype), "shape": shape, "stride": stride, "values": name}}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _written(item, prefix, values) for key, item in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_written(item, prefix, values) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(type(value))


def _read(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("a batch that was seen is damaged")
    ((kind, inside),) = value.items()
    if kind == "value":
        return inside
    if kind == "tensor":
        return _tensor(read(_TensorRecord, inside), tensors, device)
    if kind == "dict":
        return {key: _read(item, tensors, device) for key, item in read(dict[str, Any], inside).items()}
    if kind not in ("tuple", "list"):
        raise ValueError(f"a batch that was seen has a {kind!r}")
    items = [_read(item, tensors, device) for item in inside]
    return tuple(items) if kind == "tuple" else items


def _tensor(record: _TensorRecord, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    dtype = _dtype(record.dtype)
    if record.values is not None:
        tensor = tensors[record.values]
        if tensor.dtype != dtype or tensor.shape != record.shape:
            raise ValueError(f"{record.values} is {tuple(tensor.shape)} {tensor.dtype}")
        return tensor.to(device)
    if len(record.shape) != len(record.stride):
        raise ValueError(f"a tensor has shape {record.shape} and strides {record.stride}")
    try:
        return torch.empty_strided(record.shape, record.stride, dtype=dtype, device="meta")
    except RuntimeError as error:  # larger than any memory
        raise ValueError(error) from error


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}")
    return found
