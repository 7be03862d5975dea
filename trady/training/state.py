"""State as tensors and JSON, the only two ways in which trady stores anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trady.errors import CheckpointError
from trady.training.optimizer_record import read_optimizer


@dataclass(frozen=True)
class State:
    """The state of something, to be stored.

    Attributes:
        tensors: Tensors under their names.
        meta: Everything else, JSON-able.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


def optimizer_to_state(optimizer: torch.optim.Optimizer) -> State:
    """Return an optimizer's state; its tensors are named ``<parameter index>/<name>``."""
    given = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in given["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else scalars)[f"{index}/{name}"] = value
    return State(tensors, {"scalars": scalars, "param_groups": given["param_groups"]})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load a state into an optimizer over parameters of the same shapes.

    Raises:
        CheckpointError: The optimizer is another, or over other parameters.
    """
    groups, values = read_optimizer(optimizer, state.tensors, state.meta)
    try:
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state does not fit this optimizer: {error}") from error
