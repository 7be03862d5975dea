"""Optimizer state that follows the channels: kept where a channel stays, dropped where it leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trady.armed import Change
from trady.errors import StateError

#: State that scales a step down. A channel that joins late would take far too large steps from zero (the
#: bias correction of Adam counts the layer's steps, not the channel's), so it starts at the layer's mean.
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "row_var"}


def remap_state(optimizer: torch.optim.Optimizer, change: Change) -> None:
    """Rearrange an optimizer's state of one compact parameter after a draw.

    Args:
        optimizer: Any optimizer that keeps its state by parameter.
        change: Where each row of the parameter comes from.

    """
    state: dict[str, Any] | None = optimizer.state.get(change.compact)
    if not state:
        return
    sources = torch.from_numpy(change.sources)
    stays = sources >= 0
    if not bool(stays.any()):
        del optimizer.state[change.compact]
        return
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() == change.compact.dim() and value.shape[0] == change.rows_before:
            state[name] = _rearranged(value, sources.to(value.device), mean=name in _SECOND_MOMENTS)


def _rearranged(value: Tensor, sources: Tensor, *, mean: bool) -> Tensor:
    stays = sources >= 0
    kept = value[sources[stays]]
    made = (
        kept.mean(0, keepdim=True).expand(len(sources), *value.shape[1:]).clone()
        if mean
        else value.new_zeros((len(sources), *value.shape[1:]))
    )
    made[stays] = kept
    return made


def state_copies(optimizer: torch.optim.Optimizer) -> int:
    """Count the copies of a parameter that an optimizer keeps as state: 0 for SGD, 1 with momentum, 2 for Adam.

    Raises:
        StateError: The optimizer keeps one flat state for all parameters (LBFGS).

    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise StateError("LBFGS keeps one flat history that cannot follow changing channels; use SGD or AdamW")
    probe = nn.Parameter(torch.zeros(4, 4))
    probe.grad = torch.ones_like(probe)
    copies = 0
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        try:
            twin = type(optimizer)([{"params": [probe], **options}], **optimizer.defaults)
            twin.step()
        except Exception:  # an optimizer that cannot be made from its own options: assume Adam's state
            return 2
        elements = sum(v.numel() for v in twin.state[probe].values() if isinstance(v, Tensor) and v.dim() > 0)
        copies = max(copies, -(-elements // probe.numel()))
    return copies
