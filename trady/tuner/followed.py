"""What is known of an optimizer's state before it follows a draw: found out on a small twin of it.

Two twins step on the same gradients, one with larger weights: state that is larger by as much is made of weights. Then
a draw is done to one of them; an optimizer that cannot step after it is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from trady.errors import StateError
from trady.interception.armed import Change
from trady.simulation.optimizer_probe import twin_of
from trady.tuner.optimizer_state import remap_state, state_of_weights

#: Rows and columns of a parameter that is tried; those that stay, and one that joins.
_ROWS, _COLUMNS, _SOURCES = 6, 5, [2, -1, 4, 0]

#: How much larger the weights of the second twin are. A power of two: the difference is exact.
_LARGER = 16.0

#: State is made of weights if it differs by this share of their difference, but for rounding and weight decay.
_SAME = 0.05


def look_at(optimizer: torch.optim.Optimizer, compact: Sequence[nn.Parameter]) -> None:
    """Find out how an optimizer's state follows channels; :func:`remap_state` asks for it.

    One that cannot be made again, or that cannot step without a closure, a GPU or second derivatives, is not tried: its
    state is known by its names.

    Args:
        optimizer: Any optimizer.
        compact: What it may update by channel.

    Raises:
        StateError: It cannot step any more when channels have changed.
    """
    ours = {id(p) for p in compact}
    weights: set[str] = set()
    tried = False
    for group in optimizer.param_groups:
        for dimensions in dict.fromkeys(p.dim() for p in group["params"] if id(p) in ours and p.dim() > 1):
            found = _tried(optimizer, group, dimensions)
            if found is not None:
                weights |= found
                tried = True
    if tried:
        state_of_weights[optimizer] = frozenset(weights)


def _tried(optimizer: torch.optim.Optimizer, group: dict[str, Any], dimensions: int) -> set[str] | None:
    """Return the names of the state that is made of weights; ``None`` if twins cannot step."""
    twins = []
    for larger in (0.0, _LARGER):
        parameter = nn.Parameter(_values(_ROWS, dimensions, 0.7) + larger)
        twin = twin_of(optimizer, _without_decay(group), [parameter])
        if twin is None:
            return None
        try:
            for frequency in (0.3, 1.1):
                _step(twin, parameter, frequency)
        except Exception:  # whatever it needs that there is not here
            return None
        twins.append((twin, parameter))
    (first, one), (second, other) = twins
    states = first.state.get(one) or {}, second.state.get(other) or {}
    try:
        found = {
            name
            for name, value in states[0].items()
            if isinstance(value, Tensor) and value.shape == one.shape and _is_larger(value, states[1].get(name))
        }
    except DataDependentOutputException:  # tensors without values
        return None
    state_of_weights[second] = frozenset(found)
    _draw(second, other, dimensions)
    return found


def _draw(twin: torch.optim.Optimizer, parameter: nn.Parameter, dimensions: int) -> None:
    parameter.data = _values(len(_SOURCES), dimensions, 0.2)
    columns = np.arange(parameter.shape[1] if dimensions > 1 else 1)
    try:
        remap_state(twin, Change("", parameter, np.array(_SOURCES), _ROWS, columns, len(columns)))
        for frequency in (0.5, 0.9):
            _step(twin, parameter, frequency)
    except Exception as error:
        name = type(twin).__name__
        raise StateError(
            f"{name} cannot go on when other channels train ({type(error).__name__}: {error}): take AdamW, SGD or "
            "another optimizer of torch.optim (docs/optimizers.md)"
        ) from None


def _step(twin: Any, parameter: nn.Parameter, frequency: float) -> None:
    if callable(getattr(twin, "train", None)):  # schedule-free optimizers have modes
        twin.train()
    parameter.grad = _values(len(parameter), parameter.dim(), frequency)
    twin.step()


def _is_larger(value: Tensor, other: object) -> bool:
    if not isinstance(other, Tensor) or other.shape != value.shape or not value.is_floating_point():
        return False
    return bool((((other - value) / _LARGER - 1).abs() < _SAME).all())


def _without_decay(group: dict[str, Any]) -> dict[str, Any]:
    """Weight decay makes gradients, and so all state, depend on the weights."""
    return {**group, "weight_decay": 0.0} if "weight_decay" in group else group


def _values(rows: int, dimensions: int, frequency: float) -> Tensor:
    """Numbers around zero, the same ones every time; nobody's generator is asked."""
    shape = (rows, *((_COLUMNS, 3, 3, 3)[: dimensions - 1]))
    return torch.arange(1, torch.Size(shape).numel() + 1).mul(frequency).sin().view(shape)
