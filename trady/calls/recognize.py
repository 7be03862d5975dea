"""What a model calls, in trady's words: which torch functions are weight layers, norms, activations, pools.

A call that is not recognised is left to PyTorch. Both the trace (before) and the interception (while
the model runs) read calls through :func:`recognize`, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.canonical import PRODUCTS
from trady.calls.kinds import (
    ActivationCall,
    AveragePoolCall,
    Call,
    DropoutCall,
    LossCall,
    MaxPoolCall,
    NormCall,
    PadCall,
    RecurrentCall,
    SmoothCall,
    WeightCall,
)
from trady.ops.bits import Clamp
from trady.ops.operators import Convolution, Linear
from trady.ops.pooling import Window
from trady.ops.recurrent.recurrence import recurrence
from trady.ops.recurrent.steps import Steps
from trady.ops.smooth import Smooth
from trady.quantized.linear import QuantizedLinear, linear

_aten = torch.ops.aten


def recognize(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Return what a call of a torch function means, or ``None`` for calls that stay as they are."""
    reader = _READERS.get(function)
    if reader is None:
        return None
    try:
        call: Call | None = reader(*args, **kwargs)
    except TypeError:  # a signature this table does not know: PyTorch's own business
        return None
    return call


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, (tuple, list, torch.Size)) else (int(value),)
    return values * dimensions if len(values) == 1 else values


@lru_cache(maxsize=4096)
def _convolution_map(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Convolution:
    if padding == "valid":
        padding = (0,) * len(kernel)
    if not isinstance(padding, str):
        return Convolution(stride, padding, dilation, groups)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(t % 2 == 0 for t in totals):
        return Convolution(stride, tuple(t // 2 for t in totals), dilation, groups)
    sides = tuple(n for t in reversed(totals) for n in (t // 2, t - t // 2))
    return Convolution(stride, (0,) * len(kernel), dilation, groups, pad=sides)


def _convolution(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> WeightCall | None:
    if input.dim() not in (dimensions + 1, dimensions + 2):
        return None
    places = padding if isinstance(padding, str) else _each(padding, dimensions)
    made = _convolution_map(
        tuple(weight.shape[2:]), _each(stride, dimensions), places, _each(dilation, dimensions), int(groups)
    )
    return WeightCall(input, weight, bias, made)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> WeightCall | None:
    return WeightCall(input, weight, bias, Linear()) if weight.dim() == 2 else None


def _recurrence(
    gates: Tensor,
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    steps: Steps,
) -> RecurrentCall:
    return RecurrentCall(gates, weight, bias, Linear(), None, states, projection, steps)


def _quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> WeightCall:
    return WeightCall(x, weight, bias, Linear(), layer)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> WeightCall | None:
    plain = beta == 1 and alpha == 1 and input.dim() == 1 and isinstance(mat2, torch.nn.Parameter)
    return WeightCall(mat1, mat2, input, Linear(input_major=True)) if plain else None


def _product(x: Tensor, weight: Tensor) -> WeightCall | None:
    plain = isinstance(weight, torch.nn.Parameter) and weight.dim() == 2
    return WeightCall(x, weight, None, Linear(input_major=True)) if plain else None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormCall | None:
    if running_mean is None or running_var is None:
        return None  # batch statistics are all this norm has: they cannot be fixed
    return NormCall(input, running_mean, running_var, weight, bias, eps)


def _relu(input: Tensor, inplace: bool = False) -> ActivationCall:
    return ActivationCall(input, Clamp(0.0), inplace)


def _relu6(input: Tensor, inplace: bool = False) -> ActivationCall:
    return ActivationCall(input, Clamp(0.0, 6.0), inplace)


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> ActivationCall | None:
    return ActivationCall(input, Clamp(float(min_val), float(max_val)), inplace) if min_val < max_val else None


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> ActivationCall:
    return ActivationCall(input, Clamp(0.0, math.inf, float(negative_slope)), inplace)


def _in_place(reader: Callable[..., Any]) -> Callable[..., Any]:
    return partial(reader, inplace=True)


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> PadCall | None:
    sides = tuple(int(n) for n in pad)
    zero = mode == "constant" and not value and all(n >= 0 for n in sides)
    return PadCall(input, sides) if zero and len(sides) <= 2 * (input.dim() - 2) else None


def _max_pool(
    dimensions: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxPoolCall | None:
    kernel = _each(kernel_size, dimensions)
    window = Window(
        kernel,
        _each(stride, dimensions) if stride not in (None, [], ()) else kernel,
        _each(padding, dimensions),
        _each(dilation, dimensions),
        bool(ceil_mode),
    )
    if return_indices or input.dim() != dimensions + 2 or window.size > 256:
        return None
    return MaxPoolCall(input, window)


def _average_pool(
    dimensions: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> AveragePoolCall | None:
    if input.dim() != dimensions + 2:
        return None
    kernel = _each(kernel_size, dimensions)
    steps = _each(stride, dimensions) if stride not in (None, [], ()) else kernel
    sides = _each(padding, dimensions)
    if dimensions == 1:
        pool = partial(
            F.avg_pool1d,
            kernel_size=kernel,
            stride=steps,
            padding=sides,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
        )

        def gradient_1d(g: Tensor, x: Tensor) -> Tensor:
            made: Tensor = _aten.avg_pool2d_backward(
                g.unsqueeze(2),
                x.unsqueeze(2),
                (1, *kernel),
                (1, *steps),
                (0, *sides),
                ceil_mode,
                count_include_pad,
                None,
            )
            return made.squeeze(2)

        return AveragePoolCall(input, pool, gradient_1d)
    options = (kernel, steps, sides, ceil_mode, count_include_pad, divisor_override)
    forward, backward = (
        (F.avg_pool2d, _aten.avg_pool2d_backward) if dimensions == 2 else (F.avg_pool3d, _aten.avg_pool3d_backward)
    )
    return AveragePoolCall(input, lambda x: forward(x, *options), lambda g, x: backward(g, x, *options))


def _adaptive_average_pool(dimensions: int, input: Tensor, output_size: Any) -> AveragePoolCall | None:
    if input.dim() != dimensions + 2:
        return None
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * dimensions
    if all(n == 1 for n in wanted):  # the mean over all positions: its gradient is that of the output, spread
        places = tuple(range(2, dimensions + 2))
        return AveragePoolCall(
            input,
            lambda x: x.mean(places, keepdim=True),
            lambda g, x: (g / math.prod(x.shape[2:])).expand(x.shape),
        )
    if dimensions == 1:
        return None
    forward, backward = (
        (F.adaptive_avg_pool2d, _aten._adaptive_avg_pool2d_backward)
        if dimensions == 2
        else (F.adaptive_avg_pool3d, _aten._adaptive_avg_pool3d_backward)
    )
    return AveragePoolCall(input, lambda x: forward(x, output_size), lambda g, x: backward(g, x))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> DropoutCall | None:
    return DropoutCall(input, p) if training and not inplace and 0 < p < 1 else None


def _dropout_of_torch(input: Tensor, p: float, train: bool) -> DropoutCall | None:
    return _dropout(input, p, train)


def _smooth(name: str, input: Tensor, inplace: bool = False) -> SmoothCall:
    return SmoothCall(input, Smooth(name), inplace)


def _gelu(input: Tensor, *, approximate: str = "none") -> SmoothCall:
    return SmoothCall(input, Smooth("gelu_tanh" if approximate == "tanh" else "gelu"))


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> SmoothCall | None:
    return SmoothCall(input, Smooth("elu", (float(alpha),)), inplace) if alpha > 0 else None


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> SmoothCall | None:
    return SmoothCall(input, Smooth("softplus", (float(beta), float(threshold)))) if beta > 0 else None


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossCall | None:
    plain = size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or target.is_floating_point() or input.dim() < 2:
        return None
    return LossCall(input, target, weight, ignore_index, reduction == "mean", label_smoothing)


_READERS: dict[Any, Callable[..., Any]] = {
    torch.conv1d: partial(_convolution, 1),
    torch.conv2d: partial(_convolution, 2),
    torch.conv3d: partial(_convolution, 3),
    F.linear: _linear,
    linear: _quantized_linear,
    recurrence: _recurrence,
    torch.addmm: _addmm,
    **dict.fromkeys(PRODUCTS, _product),
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    torch.Tensor.relu: _relu,
    torch.relu_: _in_place(_relu),
    torch.Tensor.relu_: _in_place(_relu),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _in_place(_hardtanh),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _in_place(_leaky_relu),
    F.pad: _pad,
    F.max_pool1d: partial(_max_pool, 1),
    F.max_pool2d: partial(_max_pool, 2),
    F.max_pool3d: partial(_max_pool, 3),
    torch.max_pool1d: partial(_max_pool, 1),
    torch.max_pool2d: partial(_max_pool, 2),
    torch.max_pool3d: partial(_max_pool, 3),
    F.avg_pool1d: partial(_average_pool, 1),
    F.avg_pool2d: partial(_average_pool, 2),
    F.avg_pool3d: partial(_average_pool, 3),
    F.adaptive_avg_pool1d: partial(_adaptive_average_pool, 1),
    F.adaptive_avg_pool2d: partial(_adaptive_average_pool, 2),
    F.adaptive_avg_pool3d: partial(_adaptive_average_pool, 3),
    F.dropout: _dropout,
    F.gelu: _gelu,
    F.silu: partial(_smooth, "silu"),
    torch.tanh: partial(_smooth, "tanh"),
    torch.Tensor.tanh: partial(_smooth, "tanh"),
    torch.sigmoid: partial(_smooth, "sigmoid"),
    torch.Tensor.sigmoid: partial(_smooth, "sigmoid"),
    F.hardswish: partial(_smooth, "hardswish"),
    F.mish: partial(_smooth, "mish"),
    F.elu: _elu,
    F.softplus: _softplus,
    F.cross_entropy: _cross_entropy,
    torch.dropout: _dropout_of_torch,
}
