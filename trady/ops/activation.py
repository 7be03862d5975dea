"""Activations and frozen normalisation outside a weight layer: they keep one bit an element, or nothing."""

# N samples, C channels; bits are [N, ceil(elements of a sample / 8)]

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from trady.ops.bits import Clamp, clamp_, select
from trady.ops.context import label_saved
from trady.ops.layout import is_dense, is_owned, memory_format
from trady.ops.once import apply, once_differentiable


def clamp(x: Tensor, kind: Clamp, *, in_place: bool) -> Tensor:
    """Apply a piecewise linear activation; its backward needs one bit an element.

    Args:
        x: Any shape.
        kind: The activation.
        in_place: Overwrite ``x``; only where nobody reads ``x`` afterwards, or the model itself works in place.

    """
    in_place = in_place and is_dense(x)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = apply(_AffineClamp, x, kind, None, None, in_place)
        return out
    with torch.no_grad():
        y = x if in_place else _dense_copy(x)
        clamp_(y, kind, keep_bits=False)
    return y


def affine_clamp(x: Tensor, scale: Tensor, shift: Tensor, kind: Clamp | None, *, in_place: bool) -> Tensor:
    """Normalise with fixed statistics, ``scale * x + shift`` along dimension 1, then maybe clamp.

    Args:
        x: [N, C, ...].
        scale: [C], weight / sqrt(variance + eps).
        shift: [C], bias - mean * scale.
        kind: The activation behind the normalisation, if it is computed with it.
        in_place: Overwrite ``x``; only where nobody reads it afterwards.

    """
    in_place = in_place and is_dense(x)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = apply(_AffineClamp, x, kind, scale, shift, in_place)
        return out
    with torch.no_grad():
        y = _affine(x, scale, shift, in_place=in_place)
        if kind is not None:
            clamp_(y, kind, keep_bits=False)
    return y


def _dense_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=memory_format(x)) if is_dense(x) else x.contiguous()


def _affine(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool) -> Tensor:
    along = (1, -1, *(1,) * (x.dim() - 2))
    factor, summand = scale.view(along).to(x.dtype), shift.view(along).to(x.dtype)
    if in_place:
        return x.mul_(factor).add_(summand)
    return torch.addcmul(summand, x, factor) if is_dense(x) else torch.addcmul(summand, x.contiguous(), factor)


class _AffineClamp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: Clamp | None, scale: Tensor | None, shift: Tensor | None, in_place: bool
    ) -> Tensor:
        if scale is None or shift is None:
            y = x if in_place else _dense_copy(x)
        else:
            y = _affine(x, scale, shift, in_place=in_place)
        if in_place:
            ctx.mark_dirty(x)
        bits = None if kind is None else clamp_(y, kind, keep_bits=True)
        ctx.kind, ctx.format = kind, memory_format(y)
        ctx.save_for_backward(None if bits is None else label_saved(bits, "bits"), scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        references = sys.getrefcount(gradient)
        bits, scale = ctx.saved_tensors
        owned = is_owned(gradient, references)
        out = gradient
        if bits is not None:
            dense = gradient.contiguous(memory_format=ctx.format)
            owned = owned or dense is not gradient
            out = select(dense, bits, ctx.kind, out=dense if owned else torch.empty_like(dense))
            owned = True
        if scale is not None:
            factor = scale.view(1, -1, *(1,) * (out.dim() - 2)).to(out.dtype)
            out = out.mul_(factor) if owned else out * factor
        return out, None, None, None, None
