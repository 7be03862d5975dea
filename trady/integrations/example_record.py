"""What a trainer's checkpoint has from trady, and the example in it: a resumed run is planned for the same one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trady.errors import CheckpointError
from trady.integrations.recording import Step
from trady.model.batch import Batch, without_memory
from trady.training.checkpoint import Checkpoint, load_checkpoint
from trady.training.state import State

#: What a checkpoint of a trainer has from trady.
FOLDER = "trady"

#: Values that JSON has.
_PLAIN = (bool, int, float, str, type(None))


class _NoRecordError(Exception):
    """There is something in the example that neither JSON nor safetensors can hold."""


def step_to_state(step: Step) -> State | None:
    """Return a step as tensors and JSON values; ``None`` if it holds an object of a class of its own.

    Floating-point tensors go by their shapes: a plan asks for no more.
    """
    tensors: dict[str, Tensor] = {}
    try:
        inputs = _encoded(step.example.inputs, tensors)
    except _NoRecordError:
        return None
    return State(tensors, {"module": step.module, "calls": step.calls, "has_head": step.has_head, "inputs": inputs})


def step_from_state(state: State, device: torch.device) -> Step:
    """Read what :func:`step_to_state` gave.

    Raises:
        CheckpointError: It is something else.
    """
    try:
        meta = state.meta
        inputs = _decoded(meta["inputs"], state.tensors, device)
        return Step(str(meta["module"]), Batch(inputs), max(1, int(meta["calls"])), bool(meta["has_head"]))
    except (AttributeError, KeyError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the example batch of the checkpoint is damaged ({error}); start the run again, or name another checkpoint"
        ) from error


def _encoded(value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or type(value) is not Tensor:
            raise _NoRecordError
        if value.is_floating_point() or value.is_complex():
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, _PLAIN):
        return {"value": value}
    if hasattr(value, "keys") and all(isinstance(key, str) for key in value.keys()):  # noqa: SIM118 - maybe no mapping
        return {"dict": {key: _encoded(value[key], tensors) for key in value.keys()}}  # noqa: SIM118
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(each, tensors) for each in value]}
    raise _NoRecordError


def _decoded(record: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    (kind,) = [key for key in record if key != "dtype"]
    content = record[kind]
    if kind == "tensor":
        return tensors[content].to(device)
    if kind == "shape":
        dtype = getattr(torch, record["dtype"])
        return without_memory(torch.empty(content, dtype=dtype, device="meta"))
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _decoded(each, tensors, device) for key, each in content.items()}
    if kind in ("list", "tuple"):
        items = [_decoded(each, tensors, device) for each in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown kind {kind!r}")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what trady has written beside a trainer's checkpoint.

    Raises:
        CheckpointError: There is nothing, or it is of something else.
    """
    if not (folder / FOLDER).is_dir():
        raise CheckpointError(
            f"{folder} holds no state of trady's ({FOLDER}/): it was not written by a Trainer with a budget"
        )
    checkpoint = load_checkpoint(folder / FOLDER)
    if "tuner" not in checkpoint.states:
        raise CheckpointError(f"{folder / FOLDER} is of no Trainer; name another one, or start again")
    return checkpoint
