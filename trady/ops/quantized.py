"""Linear layers whose weight is stored quantised, and some of whose input channels are in floating point.

The weight ``W`` of such a layer is the dequantised one with the float channels ``V`` in it:

    y = Q (x with the channels of V set to zero) + V x[..., channels] + b,    dL/dx = W^T dL/dy,
    dL/dV = dL/dy x[..., channels]^T

``Q`` is the library's own product. From forward to backward only the quantised weight and the selected channels of
``x`` are kept; backward makes ``W`` of one layer at a time. PyTorch's own graph of a weight-only quantised product
(torchao) keeps the weight of every layer as the product read it, converted to floating point.
"""

# n selected input channels of C, O output channels: x [..., C], y [..., O], W [O, C], V [n, O] (transposed).

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.errors import ModelError
from trady.ops.context import label_saved, without_autocast
from trady.ops.gates import Gates
from trady.ops.layer import LayerCall, add_weight_gradient
from trady.ops.layout import take, unviewed
from trady.ops.once import once_differentiable
from trady.ops.operators import Linear
from trady.ops.rows import multiply_rows


class Quantized(Protocol):
    """A frozen linear layer that is stored quantised, bias included."""

    @property
    def shape(self) -> torch.Size:
        """Of the dequantised weight: [out, in]."""
        ...

    def product(self, x: Tensor, *, trains: bool = False) -> Tensor:
        """Apply the layer to ``x`` [..., in]; ``trains`` where some of its channels do."""
        ...

    def dense(self) -> Tensor:
        """Make the dequantised weight, float channels included, in memory of its own."""
        ...


@dataclass(frozen=True)
class Alone:
    """A quantised weight of torchao that is used outside a module that trady could read."""

    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.weight.shape

    def product(self, x: Tensor, *, trains: bool = False) -> Tensor:
        """Apply it."""
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """Dequantise."""
        return self.weight.dequantize()


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is not a dense tensor in floating point, so that its channels cannot be written to."""
    dense_dtype = weight.is_floating_point() or weight.is_complex()
    return not dense_dtype or type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_linear_in_its_input(weight: Tensor) -> bool:
    """Whether torchao dequantises this weight in a product and leaves the input as it is."""
    quantises_input = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
    return type(weight).dequantize is not Tensor.dequantize and not any(
        getattr(weight, name, None) is not None for name in quantises_input
    )


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a quantised weight [out, in] of torchao that stays as it is.

    Raises:
        ModelError: No gradient passes through the weight's class, and one is needed.

    """
    if is_linear_in_its_input(weight):
        return quantized_linear(x, None, LayerCall(Linear()), Alone(weight, bias))
    out = F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad and not out.requires_grad:
        raise ModelError(
            f"no gradient passes through a weight stored as {type(weight).__name__}, which quantises its input too: "
            "quantise the weights only (torchao: Int8WeightOnlyConfig or IntxWeightOnlyConfig)"
        )
    return out


def quantized_linear(x: Tensor, compact: Tensor | None, call: LayerCall, weight: Quantized) -> Tensor:
    """Apply a quantised linear layer.

    Args:
        x: Input, [..., in].
        compact: Leaf of shape [n, selected output channels] that receives the gradient of the selected channels.
        call: Selected channels, and what the product is computed in.
        weight: The layer.

    Returns:
        The output, [..., out]; its gradient reaches ``x`` and ``compact``.

    """
    trains = call.selected is not None and compact is not None and compact.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or trains):
        out: Tensor = _QuantizedLinear.apply(x, compact if trains else None, call, weight)
        return out
    with torch.no_grad():
        return _forward(x, call, weight, trains=False)


def _forward(x: Tensor, call: LayerCall, weight: Quantized, *, trains: bool) -> Tensor:
    dtype = call.dtype or x.dtype
    if call.graph_only:
        return x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], weight.shape[0])
    with without_autocast(x):
        return unviewed(weight.product(x.to(dtype), trains=trains).to(dtype))


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compact: Tensor | None, call: LayerCall, weight: Quantized) -> Tensor:
        y = _forward(x, call, weight, trains=compact is not None)
        inputs = None
        if compact is not None and call.selected is not None:
            inputs = label_saved(take(x, -1, call.selected.index).to(y.dtype), "channels")
        ctx.call, ctx.weight, ctx.input_dtype = call, weight, x.dtype  # the weight is alive in the model anyway
        ctx.compact_like = None if compact is None else (compact.shape, compact.dtype)
        ctx.gates = None
        if inputs is not None and call.selected is not None and call.selected.gates is not None:
            ctx.gates = Gates.of(call.selected, call.selected.gates, x.shape[0], -1)
        ctx.save_for_backward(inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        gates: Gates | None = ctx.gates
        weight_gradient = input_gradient = None
        if inputs is not None:
            shape, dtype = ctx.compact_like
            weight_gradient = torch.zeros(shape, dtype=dtype, device=gradient.device)
            if gates is None:
                add_weight_gradient(weight_gradient, gradient, inputs, ctx.call)
        if ctx.needs_input_grad[0] or gates is not None:
            made = multiply_rows(gradient, ctx.weight.dense().to(gradient.dtype))
            if gates is not None and weight_gradient is not None:
                gates.add_gradient(weight_gradient, made, inputs, slice(None))
            input_gradient = made.to(ctx.input_dtype)
        return input_gradient if ctx.needs_input_grad[0] else None, weight_gradient, None, None
