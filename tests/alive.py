"""Tensors that are alive, and those that a tuner is known to keep."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

import trady


def objects() -> list[Tensor]:
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [tensor for tensor in found if not tensor.is_meta]


def sizes(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of every storage."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages if storage.nbytes()}


def kept_by(tuner: trady.Tuner, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """What a tuner and an optimizer are known to keep: compact parameters, indices, norms, snapshot, state."""
    armed = tuner._armed
    norms = [tensor for found in armed.interceptor._handlers.norms._known.values() for tensor in found[-1]]
    snapshot = [] if tuner._snapshot is None else tuner._snapshot.tensors
    state: list[Tensor] = []
    for values in {} if optimizer is None else optimizer.state.values():
        state += [value for value in values.values() if isinstance(value, Tensor)]
    chosen = [each.selected for each in tuner._snapshot._slices] if tuner._snapshot is not None else []
    indices = [*armed.indices, *(tensor for selected in chosen for tensor in selected.tensors)]
    return [*(layer.compact for layer in armed.layers.values()), *indices, *norms, *snapshot, *state]
