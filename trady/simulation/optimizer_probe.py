"""What an optimizer takes, measured by trying a twin of it on small parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trady.errors import StateError
from trady.memory import LiveBytes
from trady.optim.in_backward import UpdatesInBackward
from trady.simulation.optimizer_memory import Amount, Form, OptimizerMemory

#: What an optimizer is taken to need where it cannot be tried out: Adam's state, and as much for a moment.
_ASSUMED = OptimizerMemory(copies=2, every=2.0)


def twin_of(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer | None:
    """An optimizer of the same kind and options over a few parameters; ``None`` where it cannot be made."""
    options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    # One that updates inside the backward pass keeps the state of its outer optimizer, which needs no tuner.
    kind = optimizer.outer if isinstance(optimizer, UpdatesInBackward) else type(optimizer)
    accepted = inspect.signature(kind).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    defaults = {name: value for name, value in optimizer.defaults.items() if takes_all or name in accepted}
    try:
        return kind([{"params": list(parameters), **options}], **defaults)
    except Exception:
        return None


def state_copies(optimizer: torch.optim.Optimizer) -> int:
    """Count the copies of a parameter that an optimizer keeps as state: 0 for SGD, 1 with momentum, 2 for Adam.

    Raises:
        StateError: As for :func:`optimizer_memory`.

    """
    return optimizer_memory(optimizer).copies


def optimizer_memory(optimizer: torch.optim.Optimizer) -> OptimizerMemory:
    """Measure what an optimizer takes: a twin of it steps on a few small parameters on the same device.

    One that cannot be tried out is taken to keep two copies of every parameter and to need two more in a step.

    Raises:
        StateError: The optimizer keeps one flat state for all parameters (LBFGS).

    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise StateError("LBFGS keeps one flat history that cannot follow changing channels; use SGD or AdamW")
    found = OptimizerMemory()
    for group in optimizer.param_groups:
        kinds = ((p.dtype, torch.device("cpu") if p.is_meta else p.device) for p in group["params"])
        for dtype, device in dict.fromkeys(kinds):
            try:
                found |= _memory(lambda shape: _needs(optimizer, group, shape, dtype, device))  # noqa: B023
            except Exception:
                found |= _ASSUMED
    return found


#: A matrix, one row, a pointwise convolution and another one: factored second moments take most for the second and
#: third. They are large beside a number of steps or a mean.
_PROBES = ((64, 64), (1, 4096), (64, 64, 1, 1), (64, 8, 4, 2))

#: What the needs for these shapes tell of others must be right for this one.
_CHECK = (32, 128)

#: Steps and means, as a share of these parameters.
_SMALL = 0.02

#: Copies of a parameter that are kept, that a step needs of each, of the current one and of the one before.
_Needs = tuple[float, float, float, float]


def _memory(needs: Callable[[tuple[int, ...]], _Needs]) -> OptimizerMemory:
    """Put together what parameters of different shapes need."""
    found = [needs(shape) for shape in _PROBES]
    kept, *moment = map(max, zip(*found, strict=True))
    memory = OptimizerMemory(math.ceil(kept), *moment)
    if all(max(each) - min(each) < _SMALL for each in zip(*found, strict=True)):
        return memory
    forms = [Form.of(shape, 1) for shape in _PROBES]
    solved = np.linalg.solve(np.array([astuple(form) for form in forms]), np.array(found) * 4096).T
    amounts = [Amount(*(round(n) if abs(n - round(n)) < _SMALL else float(n) for n in numbers)) for numbers in solved]
    form, checked = Form.of(_CHECK, 1), needs(_CHECK)
    right = all(abs(a.of(form) / form.whole - n) < _SMALL for a, n in zip(amounts, checked, strict=True))
    if not right or min(min(astuple(amount)) for amount in amounts) < 0:
        return memory
    kept_of, every, current, previous = amounts
    return replace(memory, factored=(kept_of, every, current, previous))


def _needs(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> _Needs:
    """Tell from steps over one, two and three parameters which temporaries there are for each of them."""
    one_two_three = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(n)] for n in (1, 2, 3))
    (copies, one), (_, two), (_, three) = (_step(optimizer, group, values) for values in one_two_three)
    every = max(three - two, 0.0)
    current = max(one - every, 0.0)
    return copies, every, current, max(two - 2 * every - current, 0.0)


def _step(optimizer: torch.optim.Optimizer, group: dict[str, Any], values: list[Tensor]) -> tuple[float, float]:
    """Copies of a parameter that are kept, and how many more are alive in the first two steps."""
    parameters = [nn.Parameter(value) for value in values]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    twin = twin_of(optimizer, group, parameters)
    if twin is None:
        raise StateError("the optimizer cannot be made again")
    size, most, kept = parameters[0].nbytes, 0, 0
    for _ in range(2):
        live = LiveBytes()
        live.register([*parameters, *(p.grad for p in parameters if p.grad is not None), *_tensors(twin)])
        with live:
            twin.step()
        state = _tensors(twin)
        kept = sum(t.nbytes for t in state)
        most = max(most, live.peak - 2 * size * len(parameters) - kept)
    copies = sum(t.nbytes for t in state if t.dim() > 0) / (size * len(parameters))
    return copies, most / size


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
