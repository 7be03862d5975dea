"""Optimizer state that follows the channels: kept where a channel stays, dropped where it leaves."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trady.channels.selection import Channels
from trady.interception.armed import Change
from trady.ops.selected import numbers_on
from trady.simulation.optimizer_probe import twin_of

#: State that scales a step down. A channel that joins late would take far too large steps from zero (the
#: bias correction of Adam counts the layer's steps, not the channel's), so it starts at the layer's mean.
_SECOND_MOMENTS = {
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "sum",
    "square_avg",
    "acc_delta",
    "row_var",
    "col_var",
    "step_size",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "grad_sum_sq",
}

#: State that is made of weights: MADGRAD's starting point, the iterate of schedule-free optimizers, Lookahead's slow
#: weights, ASGD's average. A channel that joins starts from where it is, and is not pulled towards zero. The names
#: count where the optimizer itself could not be tried (:mod:`trady.tuner.followed`).
_WEIGHTS = frozenset({"x0", "z", "ax", "slow", "slow_buffer", "slow_param", "slow_params", "old_p"})

#: By optimizer, the names of its state that is made of weights, where it was tried.
state_of_weights: weakref.WeakKeyDictionary[torch.optim.Optimizer, frozenset[str]] = weakref.WeakKeyDictionary()

#: The dimension, from the end, that a factored second moment is a mean over: torch keeps it, of size 1, and
#: transformers leaves it out.
_AVERAGED = {"row_var": 1, "col_var": 2, "exp_avg_sq_row": 1, "exp_avg_sq_col": 2}


#: By optimizer, the groups for which its constructor makes no state.
_STATELESS: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[int]] = weakref.WeakKeyDictionary()


def remap_state(optimizer: torch.optim.Optimizer, change: Change) -> None:
    """Rearrange an optimizer's state of one compact parameter after a draw.

    Args:
        optimizer: Any optimizer that keeps its state by parameter.
        change: Where each row and column of the parameter comes from.

    """
    state: dict[str, Any] | None = optimizer.state.get(change.compact)
    moves = change.moves
    remain = all((sources >= 0).any() for sources, _ in moves)
    if not state or not remain or not all(_follows(name, value, change) for name, value in state.items()):
        _start_fresh(optimizer, change.compact)
        return
    weights = state_of_weights.get(optimizer, _WEIGHTS)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        left_out = value.dim() < change.compact.dim()
        averaged = change.compact.dim() - _AVERAGED.get(name, 0)  # beyond the last one for what is no mean
        if left_out:
            value = value.unsqueeze(averaged)
        for dim, (sources, before) in enumerate(moves):
            stayed = len(sources) == before and bool((np.diff(sources, prepend=-1) == 1).all())
            if value.shape[dim] == before and dim != averaged and not stayed:
                value = rearranged(value, sources, dim, mean=name in _SECOND_MOMENTS)
        if name in weights and value.shape == change.compact.shape:
            value = _from_weights(value, change)
        state[name] = value.squeeze(averaged) if left_out else value


def _from_weights(value: Tensor, change: Change) -> Tensor:
    """Put the weights of the channels that joined in their place in a state that is made of weights."""
    made, weights = value.clone(), change.compact.detach().to(value.dtype)
    for dim, (sources, _) in enumerate(change.moves):
        joined = numbers_on(value.device, np.flatnonzero(sources < 0))
        made.index_copy_(dim, joined, weights.index_select(dim, joined))
    return made


def _follows(name: str, value: object, change: Change) -> bool:
    """Whether it is known which part of a state belongs to which channel.

    In blocks of numbers that are quantised together, as in 8-bit optimizers, it is not, nor in products of all channels
    with all others (Shampoo, SOAP), nor in lists of tensors.
    """
    if not isinstance(value, Tensor):
        return not any(isinstance(leaf, Tensor) and leaf.dim() for leaf in tree_leaves(value))
    dims = change.compact.dim()
    if value.dim() == 0:
        return True
    if value.dim() == dims - 1:
        return name in _AVERAGED
    before = (*(number for _, number in change.moves), *change.compact.shape[2:])[:dims]
    return value.dim() == dims and all(size in (1, had) for size, had in zip(value.shape, before, strict=True))


def _start_fresh(optimizer: torch.optim.Optimizer, compact: nn.Parameter) -> None:
    """Leave the state as the optimizer makes it before a first step; most make none."""
    groups = optimizer.param_groups
    if compact not in optimizer.state and len(_STATELESS.get(optimizer, ())) == len(groups):
        return
    place = next((i for i, group in enumerate(groups) if any(p is compact for p in group["params"])), None)
    if place is None:
        return
    stateless = _STATELESS.setdefault(optimizer, set())
    fresh = None if len(compact) == 0 or place in stateless else twin_of(optimizer, groups[place], [compact])
    made = {} if fresh is None else dict(fresh.state.get(compact, {}))
    if fresh is not None and not made:
        stateless.add(place)  # whether its constructor makes state does not change: one try says it
    if made:
        optimizer.state[compact] = made
    else:
        optimizer.state.pop(compact, None)


def rearranged(value: Tensor, sources: Channels, dim: int, *, mean: bool) -> Tensor:
    """Rows of what is kept of the channels, in their new order; what joins gets zeros, or the mean of what stayed."""
    stayed = np.flatnonzero(sources >= 0)
    places = numbers_on(value.device, stayed)
    kept = value.index_select(dim, numbers_on(value.device, sources[stayed]))
    shape = [*value.shape[:dim], len(sources), *value.shape[dim + 1 :]]
    made = kept.mean(dim, keepdim=True).expand(shape).clone() if mean else value.new_zeros(shape)
    return made.index_copy_(dim, places, kept)
