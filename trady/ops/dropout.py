"""Dropout that keeps its mask in one bit an element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trady.ops.bits import Clamp, pack_mask, select
from trady.ops.context import device_type, label_saved
from trady.ops.layout import memory_format
from trady.ops.once import once_differentiable

#: A mask acts as the derivative of an activation whose bits are known.
_MASK = Clamp(0.0)


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element with the given probability and scale the rest by 1 / (1 - probability).

    Draws the random numbers that ``torch.nn.functional.dropout`` draws, so a seed gives the same mask.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Dropout.apply(x, probability)
        return out
    return torch.nn.functional.dropout(x, probability, training=True)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        if device_type(x) == "cpu":
            y = torch.empty_like(x).bernoulli_(1 - probability)
            kept = y != 0
            y.div_(1 - probability).mul_(x)
        else:
            y, kept = torch.native_dropout(x, probability, True)
        kept = kept.contiguous(memory_format=memory_format(y))
        ctx.keep, ctx.format = 1 - probability, memory_format(y)
        ctx.save_for_backward(label_saved(pack_mask(kept), "bits"))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        dense = gradient.contiguous(memory_format=ctx.format)
        out = select(dense, bits, _MASK, out=torch.empty_like(dense))
        return out.div_(ctx.keep), None
