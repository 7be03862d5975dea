"""Frozen linear layers whose weight is stored quantised: backward keeps the quantised weight, no float copy of it.

PyTorch's own graph of a weight-only quantised product (torchao) saves the weight as the product read it,
converted to floating point, from every layer's forward to its backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.errors import ModelError
from trady.ops.layout import unviewed


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is not a dense tensor of numbers, so that no channel of it can be written to."""
    numbers = weight.is_floating_point() or weight.is_complex()
    return not numbers or type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a frozen linear layer.

    Args:
        x: Input, [..., in].
        weight: Quantised weight [out, in], of a class of torchao.
        bias: Frozen bias [out].

    Raises:
        ModelError: No gradient passes through the weight's class, and one is needed.

    """
    needed = torch.is_grad_enabled() and x.requires_grad
    if needed and _is_linear_in_its_input(weight):
        out: Tensor = _QuantizedLinear.apply(x, weight, bias)
        return out
    out = F.linear(x, weight, bias)
    if needed and not out.requires_grad:
        raise ModelError(
            f"no gradient passes through a weight stored as {type(weight).__name__}, which quantises its input too: "
            "quantise the weights only (torchao: Int8WeightOnlyConfig or IntxWeightOnlyConfig)"
        )
    return out


def _is_linear_in_its_input(weight: Tensor) -> bool:
    quantises_input = any(getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return type(weight).dequantize is not Tensor.dequantize and not quantises_input


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen, and alive in the model anyway
        return unviewed(F.linear(x, weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None, None
