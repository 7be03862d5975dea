"""Backward passes that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trady.errors import StateError


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function, without looking through its arguments for what ``torch.func`` may have wrapped."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return _quick_apply(function)(*arguments)


@functools.cache
def _quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    below: Any = super(torch.autograd.Function, function)
    return below.apply  # type: ignore[no-any-return]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Compute a backward pass without a graph, and refuse to differentiate what it returns.

    PyTorch's decorator of this name refuses in words about itself, and not at all where the incoming gradient is a
    constant: ``create_graph=True`` would then leave terms out of a second derivative without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():  # it is with create_graph=True alone
            return backward(ctx, *gradients)
        with torch.no_grad():
            returned = backward(ctx, *gradients)
        outputs = returned if isinstance(returned, tuple) else (returned,)
        places = [place for place, output in enumerate(outputs) if output is not None]
        refusing = list(outputs)
        leaves = (outputs[place].detach().requires_grad_() for place in places)
        for place, tensor in zip(places, _Refuses.apply(*leaves), strict=True):
            refusing[place] = tensor
        return tuple(refusing) if isinstance(returned, tuple) else refusing[0]

    return once


class _Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise StateError(
            "a gradient of a prepared model was differentiated a second time (create_graph=True, as for a gradient "
            "penalty): its layers have first derivatives only. Compute the penalty with a plain copy of the model, "
            "or train with trady.prepare(...) without it"
        )
