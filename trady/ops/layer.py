"""A weight layer whose weight gradient exists for the selected channels only.

Computes ``y = clamp(scale * (W x + b) + shift)`` in one node of the graph: the normalisation after
the layer (statistics fixed) is folded into the weight and saves nothing, the activation after it is
applied in place and saves one bit an element. For the weight it keeps the selected channels of ``x``
and yields ``dL/dW[:, c]`` for those alone (TraDy, arXiv 2510.19675, section 3), of some of the output
channels if only these train.
"""

# N samples, C input channels, O output channels, n selected input channels, m selected output channels
# a group (O / groups if all train), K the kernel's dimensions, P positions: x_NCP, weight_OCK, compact_nmK.

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trady.ops.bits import Clamp, clamp_, select
from trady.ops.context import label_saved, without_autocast
from trady.ops.gates import Gates
from trady.ops.layout import CHUNK_BYTES, as_type, chunks, is_dense, is_owned, memory_format, take, unviewed
from trady.ops.once import apply, once_differentiable
from trady.ops.operators import Linear, WeightOperator
from trady.ops.selected import SelectedChannels
from trady.ops.standardised import raw_gradient_, standardise


@dataclass(slots=True)  # not frozen: one is made a call, and each field would cost another
class LayerCall:
    """How one call of a weight layer is computed.

    Attributes:
        operator: Convolution or linear geometry.
        selected: The channels that train; ``None`` when none does.
        clamp: The activation after the layer, if it is computed with it.
        dtype: What the products are computed in (autocast); ``None`` is the input's own dtype.
        graph_only: Make the graph, not the values: nobody reads them. For linear layers.
        eps: Added to the variance of a filter where filters are standardised; ``scale`` is then their gain, and
            ``shift`` the bias (:mod:`trady.ops.standardised`).
    """

    operator: WeightOperator
    selected: SelectedChannels | None = None
    clamp: Clamp | None = None
    dtype: torch.dtype | None = None
    graph_only: bool = False
    eps: float | None = None


def layer(
    x: Tensor,
    compact: Tensor | None,
    call: LayerCall,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Apply a weight layer, with its folded normalisation and activation.

    Args:
        x: Input, batch first.
        compact: Leaf of shape [n, selected output channels a group, *kernel] that receives the gradient of
            the selected channels; its values are not read, those of ``weight`` count. Where the channels have gates,
            it receives the gradient of the gates, [n, samples].
        call: Geometry, selected channels, activation.
        weight: The frozen weight.
        bias: Bias of the layer.
        scale: One factor an output channel, of the normalisation after the layer.
        shift: One summand an output channel, added after scaling.

    Returns:
        The output; its gradient reaches ``x`` and ``compact``.

    """
    trains = call.selected is not None and compact is not None and compact.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or trains):
        if scale is None and shift is None and type(call.operator) is Linear and _is_plain(x, weight, call):
            made: Tensor = apply(_PlainLinear, x, compact if trains else None, call, weight, bias)
            return made
        out: Tensor = apply(_Layer, x, compact if trains else None, call, weight, bias, scale, shift)
        return out
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        y, _ = _forward(x, call, weight, bias, scale, shift, keep_bits=False)
    return y


def _is_plain(x: Tensor, weight: Tensor, call: LayerCall) -> bool:
    """Whether a linear layer is computed alone, in the type of its input, with values."""
    selected = call.selected
    return (
        weight.dtype is x.dtype
        and call.clamp is None
        and not call.graph_only
        and (call.dtype is None or call.dtype is x.dtype)
        and (selected is None or selected.gates is None)
    )


def _forward(
    x: Tensor,
    call: LayerCall,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    keep_bits: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = call.dtype or x.dtype
    if call.graph_only:
        outputs = call.operator.output_channels(weight)
        return x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], outputs), None
    folded = as_type(_fold(weight, scale, call), dtype)
    offset = _fold_bias(bias, scale, shift)
    y = call.operator.forward(as_type(x, dtype), folded, None if offset is None else as_type(offset, dtype))
    bits = None
    if call.clamp is not None:
        bits = clamp_(y, call.clamp, keep_bits=keep_bits)
    return unviewed(y), bits


def _fold(weight: Tensor, scale: Tensor | None, call: LayerCall) -> Tensor:
    if call.eps is not None:
        return standardise(weight, scale, call.eps)
    return weight if scale is None else call.operator.scale_outputs(weight, scale)


def _fold_bias(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if scale is None or bias is None:
        return bias if shift is None else shift
    return bias * scale if shift is None else torch.addcmul(shift, bias, scale)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compact: Tensor | None,
        call: LayerCall,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        with without_autocast(x):
            y, bits = _forward(x, call, weight, bias, scale, shift, keep_bits=True)
            inputs = None
            if compact is not None and call.selected is not None:
                inputs = as_type(take(x, call.operator.channel_dim, call.selected.index), y.dtype)
        ctx.call, ctx.input_shape, ctx.input_dtype = call, x.shape, x.dtype
        ctx.format = None if bits is None else memory_format(y)
        ctx.compact_like = None if compact is None else (compact.shape, compact.dtype)
        ctx.gates = None
        if inputs is not None and call.selected is not None and call.selected.gates is not None:
            ctx.gates = Gates.of(call.selected, call.selected.gates, x.shape[0], call.operator.channel_dim)
        ctx.save_for_backward(
            None if inputs is None else label_saved(inputs, "channels"),
            None if bits is None else label_saved(bits, "bits"),
            weight,
            scale,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, bits, weight, scale = ctx.saved_tensors
        call: LayerCall = ctx.call
        gates: Gates | None = ctx.gates
        references = sys.getrefcount(gradient)  # as an argument, it would have one more
        owned = bits is not None and is_owned(gradient, references)
        wants_input = ctx.needs_input_grad[0]
        folded = as_type(_fold(weight, scale, call), gradient.dtype) if wants_input or gates else None
        weight_gradient = None
        if inputs is not None:
            shape, dtype = ctx.compact_like
            weight_gradient = torch.zeros(shape, dtype=dtype, device=gradient.device)
        input_gradient: Tensor | None = None
        in_chunks = call.operator.pad or (bits is not None and not owned) or (gates is not None and not wants_input)
        slices = [slice(None)]
        if in_chunks:
            slices = _chunks(gradient, max(gradient.numel(), math.prod(ctx.input_shape)) * gradient.element_size())
        for chunk in slices:
            full = len(slices) == 1
            g = gradient if full else gradient[chunk]
            if bits is not None:
                g = _before_activation(g, bits if full else bits[chunk], call, ctx.format, owned)
            if weight_gradient is not None and gates is None:
                add_weight_gradient(weight_gradient, g, inputs if full else inputs[chunk], call)
            if folded is not None:
                shape = ctx.input_shape if full else torch.Size((g.shape[0], *ctx.input_shape[1:]))
                made = call.operator.input_gradient(g, folded, shape)
                layout = None if full and is_dense(made) else memory_format(g)
                del g
                if gates is not None and weight_gradient is not None:
                    gates.add_gradient(weight_gradient, made, inputs, chunk)
                if wants_input and full:
                    dense = made if layout is None else made.contiguous(memory_format=layout)
                    input_gradient = as_type(dense, ctx.input_dtype)
                elif wants_input:
                    if input_gradient is None:
                        input_gradient = torch.empty(
                            ctx.input_shape, dtype=ctx.input_dtype, device=made.device, memory_format=layout
                        )
                    input_gradient[chunk].copy_(made)
                del made
        if weight_gradient is not None and scale is not None and gates is None:
            weight_gradient = _scale_gradient(weight_gradient, scale, call)
        if weight_gradient is not None and call.eps is not None and gates is None:
            assert call.selected is not None
            operator = call.operator
            raw_gradient_(weight_gradient, weight, call.eps, operator.kind, operator.groups, call.selected)
        return input_gradient, weight_gradient, None, None, None, None, None


class _PlainLinear(torch.autograd.Function):
    """A linear layer with nothing folded into it: what :class:`_Layer` does, with few calls around the products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compact: Tensor | None, call: LayerCall, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        selected, inputs = call.selected, None
        with without_autocast(x):
            y = call.operator.forward(x, weight, None if bias is None else as_type(bias, x.dtype))
            if compact is not None and selected is not None:
                inputs = label_saved(take(x, -1, selected.index), "channels")
        ctx.call, ctx.input_shape = call, x.shape
        ctx.compact_like = None if compact is None else (compact.shape, compact.dtype)
        ctx.save_for_backward(inputs, weight)
        return unviewed(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        call: LayerCall = ctx.call
        operator, selected = call.operator, call.selected
        assert isinstance(operator, Linear)
        input_gradient: Tensor | None = None
        weight_gradient: Tensor | None = None
        if inputs is not None and selected is not None:
            shape, dtype = ctx.compact_like
            if selected.outputs is None:
                selected.check_current()
                weight_gradient = as_type(operator.channel_gradient(gradient, inputs), dtype)
            else:
                weight_gradient = torch.zeros(shape, dtype=dtype, device=gradient.device)
                add_weight_gradient(weight_gradient, gradient, inputs, call)
        if ctx.needs_input_grad[0]:
            input_gradient = operator.input_gradient(gradient, weight, ctx.input_shape)
        return input_gradient, weight_gradient, None, None, None


def _chunks(gradient: Tensor, total_bytes: int) -> list[slice]:
    """Slices of the batch, so that a second copy of what they hold stays small."""
    if total_bytes <= CHUNK_BYTES or gradient.dim() < 2:
        return [slice(None)]
    return list(chunks(gradient.shape[0], total_bytes // gradient.shape[0]))


def add_weight_gradient(total: Tensor, gradient: Tensor, inputs: Tensor, call: LayerCall) -> None:
    """Add the gradient of the selected channels, whose ``inputs`` were kept, to ``total``."""
    selected = call.selected
    assert selected is not None
    selected.check_current()
    if selected.outputs is None:
        call.operator.weight_gradient(gradient, inputs, selected, total)
        return
    dim = call.operator.channel_dim
    read = gradient.numel() // gradient.shape[dim] * len(selected.outputs) * gradient.element_size()
    for chunk in _chunks(gradient, read):
        narrow = take(gradient[chunk], dim, selected.outputs)
        call.operator.weight_gradient(narrow, inputs[chunk], selected, total)


def _before_activation(
    gradient: Tensor, bits: Tensor, call: LayerCall, layout: torch.memory_format, owned: bool
) -> Tensor:
    assert call.clamp is not None
    dense = gradient.contiguous(memory_format=layout)
    mine = owned or dense is not gradient
    return select(dense, bits, call.clamp, out=dense if mine else torch.empty_like(dense))


def _scale_gradient(weight_gradient: Tensor, scale: Tensor, call: LayerCall) -> Tensor:
    """Chain rule through the folded normalisation: W enters as ``scale * W``."""
    assert call.selected is not None
    if call.selected.outputs is not None:
        scale = scale.index_select(0, call.selected.outputs)
    outputs = weight_gradient.shape[1]
    rows = scale.view(-1, outputs)[call.selected.group] if call.operator.groups > 1 else scale.view(1, outputs)
    return weight_gradient.mul_(rows.view(*rows.shape, *(1,) * (weight_gradient.dim() - 2)))
