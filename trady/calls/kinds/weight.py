"""Layers with a weight whose input channels can train: convolutions and linear layers, also quantised ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trady.calls.actions import WithLayer
from trady.calls.canonical import PRODUCTS
from trady.calls.handling import Handling, TrainedLayer, any_trains, constant, labelled, refuse_trained
from trady.calls.kind import Bound, Call, CallKind, Keeps
from trady.calls.kinds.sizes import by_dimension, each
from trady.calls.sample_rules import SampledCall
from trady.ops.context import autocast_dtype
from trady.ops.layer import LayerCall, layer
from trady.ops.operators import Convolution, Linear
from trady.ops.parameter_class import is_parameter_class
from trady.ops.quantized import frozen_linear, is_quantized, quantized_linear
from trady.ops.selected import DenseWeight
from trady.ops.standardised import standardised_convolution
from trady.quantized.linear import QuantizedLinear
from trady.quantized.linear import linear as linear_of_quantized


@dataclass(frozen=True)
class WeightCall(Call):
    """``operator`` applied to ``x``: a convolution or a linear layer.

    Attributes:
        weight: Its weight.
        bias: Its bias.
        operator: Its geometry.
        layer: Where its weight is quantised.
        eps: Added to the variance of a filter where filters are standardised (:mod:`trady.ops.standardised`).
        gain: By what these are multiplied, [O].
    """

    weight: Tensor
    bias: Tensor | None
    operator: Convolution | Linear
    layer: QuantizedLinear | None = None
    eps: float | None = None
    gain: Tensor | None = None

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, or of what a quantised one stands for."""
        return self.weight.shape if self.layer is None else self.layer.shape

    @property
    def output_channels(self) -> int:
        """Number of output channels."""
        return self.weight_shape[1 if self.operator.kind == "addmm" else 0]


# -- how it is recognised -------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _convolution_operator(
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
    places = padding if isinstance(padding, str) else each(padding, dimensions)
    operator = _convolution_operator(
        tuple(weight.shape[2:]), each(stride, dimensions), places, each(dilation, dimensions), int(groups)
    )
    return WeightCall(input, weight, bias, operator)


def _standardised(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float, *options: Any, **others: Any
) -> WeightCall | None:
    found = _convolution(weight.dim() - 2, x, weight, bias, *options, **others)
    return None if found is None else replace(found, eps=eps, gain=gain)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> WeightCall | None:
    return WeightCall(input, weight, bias, Linear()) if weight.dim() == 2 else None


def _quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> WeightCall:
    return WeightCall(x, weight, bias, Linear(), layer)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> WeightCall | None:
    plain = beta == 1 and alpha == 1 and input.dim() == 1 and isinstance(mat2, nn.Parameter)
    return WeightCall(mat1, mat2, input, Linear(input_major=True)) if plain else None


def _product(x: Tensor, weight: Tensor) -> WeightCall | None:
    plain = isinstance(weight, nn.Parameter) and weight.dim() == 2
    return WeightCall(x, weight, None, Linear(input_major=True)) if plain else None


# -- what is known of it --------------------------------------------------------------------------------------------


def _by_sample(sampled: SampledCall) -> bool:
    call = sampled.call
    assert isinstance(call, WeightCall)
    place = 1 if call.operator.kind == "addmm" else 0
    x, others = sampled.input_axes[place], [*sampled.input_axes[:place], *sampled.input_axes[place + 1 :]]
    if x is None or any(others):
        return False
    return x.dim == 0 if call.operator.kind.startswith("conv") else x.dim < len(sampled.input_shapes[place]) - 1


def _frees_result(call: WeightCall) -> bool:
    # The backward pass of a quantised layer of another library may read its result.
    return not is_quantized(call.weight)


# -- how it is computed ---------------------------------------------------------------------------------------------


def _compute(call: WeightCall, handling: Handling) -> Tensor | None:
    action = handling.action
    if not isinstance(call.weight, nn.Parameter) or handling.in_head(call.weight):
        return None
    own = handling.layer_of(call.weight)
    if any_trains(None if own else call.weight, call.bias, call.gain):
        if own is not None or isinstance(action, WithLayer):
            refuse_trained(call.weight, call.bias, call.gain)
        return None
    quantized = call.layer or (None if own is None or isinstance(own.truth, DenseWeight) else own.truth)
    if quantized is None and is_quantized(call.weight):
        return frozen_linear(call.x, call.weight, call.bias) if call.operator.kind == "linear" else None
    fused = action if isinstance(action, WithLayer) else WithLayer()
    x = call.x
    if isinstance(call.operator, Convolution):
        x = x if x.dim() == call.weight.dim() else x.unsqueeze(0)
    elif x.dim() == 1:
        x = x.unsqueeze(0)
    out = _Layer(call, fused, own, quantized, handling).of(x)
    return out if x.dim() == call.x.dim() else out.squeeze(0)


class _Layer:
    """A weight layer of which all is known but its input.

    Args:
        call: A call of it.
        fused: What is computed with it.
        own: The layer, if it can be updated by input channel.
        quantized: The layer, if its weight is stored quantised.
        handling: The armed model.
    """

    __slots__ = (
        "_bias", "_eps", "_fused", "_gain", "_handling", "_operation", "_operator", "_options", "_own", "_quantized",
        "_weight",
    )  # fmt: skip

    def __init__(
        self,
        call: WeightCall,
        fused: WithLayer,
        own: TrainedLayer | None,
        quantized: QuantizedLinear | None,
        handling: Handling,
    ) -> None:
        self._weight, self._bias, self._own = call.weight, call.bias, own
        computes_more = fused.norm is not None or fused.clamp is not None or fused.pad
        self._fused = fused if computes_more else None
        self._quantized, self._handling = quantized, handling
        self._eps, self._gain = call.eps, call.gain
        operator = call.operator
        padded = isinstance(operator, Convolution) and fused.pad
        self._operator = _with_padding(operator, fused.pad) if padded else operator
        self._operation = fused.operation or operator.kind
        self._options: LayerCall | None = None

    def of(self, x: Tensor) -> Tensor:
        """Compute it for an input."""
        own, handling, scale, shift = self._own, self._handling, self._gain, None
        if (fused := self._fused) is not None:
            if fused.norm is not None:
                refuse_trained(fused.norm.weight, fused.norm.bias)
                scale, shift = handling.scale_and_shift(fused.norm)
            handling.commit()
        selected, leaf = (None, None) if own is None else (own.selected, own.leaf)
        dtype = autocast_dtype(x) if x.dtype is not torch.float64 else None
        options = self._options
        if options is None or options.selected is not selected or options.dtype is not dtype:
            clamp = None if fused is None else fused.clamp
            options = LayerCall(self._operator, selected, clamp, dtype, handling.graph_only, self._eps)
            if selected is None:  # the indices of a draw that is over would stay
                self._options = options
        with labelled(self._operation):
            if self._quantized is not None:
                out = quantized_linear(x, leaf, options, self._quantized)
            else:
                bias = self._bias
                if self._eps is not None:  # a gain scales the filters alone
                    bias, shift = None, bias
                out = layer(x, leaf, options, constant(self._weight), bias, scale, shift)
        if own is not None and handling.watched:
            handling.ran(own, out)
        return out


def _bind(call: WeightCall, args: tuple[Any, ...], kwargs: Mapping[str, Any], handling: Handling) -> Bound | None:
    weight, bias, action = call.weight, call.bias, handling.action
    own = handling.layer_of(weight)
    plain = is_parameter_class(type(weight)) and call.layer is None and not is_quantized(weight)
    plain = plain and call.eps is None
    if kwargs or not plain or handling.in_head(weight) or not (own is None or isinstance(own.truth, DenseWeight)):
        return None
    place = next(index for index, value in enumerate(args) if value is call.x)
    fixed, count = (*args[:place], *args[place + 1 :]), len(args)
    triple = place == 0 and count == 3  # x, weight, bias
    dims = weight.dim() if isinstance(call.operator, Convolution) else None
    of = _Layer(call, action if isinstance(action, WithLayer) else WithLayer(), own, None, handling).of

    def compute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != count or (bias is not None and bias.requires_grad):
            return NotImplemented
        if own is None and weight.requires_grad:
            return NotImplemented
        x = args[place]
        if type(x) is not Tensor:
            return NotImplemented
        if triple:
            if args[1] is not fixed[0] or args[2] is not fixed[1]:
                return NotImplemented
        elif not all(map(is_, (*args[:place], *args[place + 1 :]), fixed)):
            return NotImplemented
        if x.dim() != dims if dims is not None else x.dim() < 2:
            return NotImplemented
        return of(x)

    return compute


@lru_cache(maxsize=4096)
def _with_padding(operator: Convolution, pad: tuple[int, ...]) -> Convolution:
    """Move padding that was put off into the convolution: for free where both sides are equal."""
    dimensions = len(operator.stride)
    full = [*pad, *(0,) * (2 * dimensions - len(pad))]
    sides = [(full[2 * d], full[2 * d + 1]) for d in reversed(range(dimensions))]
    if not operator.pad and all(before == after for before, after in sides):
        padding = tuple(p + before for p, (before, _) in zip(operator.padding, sides, strict=True))
        return replace(operator, padding=padding)
    inner = operator.pad or (0,) * (2 * dimensions)
    return replace(operator, pad=tuple(a + b for a, b in zip(full, inner, strict=True)))


WEIGHT = CallKind(
    WeightCall,
    readers={
        **by_dimension(_convolution, torch.conv1d, torch.conv2d, torch.conv3d),
        standardised_convolution: _standardised,
        F.linear: _linear,
        linear_of_quantized: _quantized_linear,
        torch.addmm: _addmm,
        **dict.fromkeys(PRODUCTS, _product),
    },
    keeps=lambda call: Keeps.NOTHING,
    handler=_compute,
    bind=_bind,
    samples=_by_sample,
    frees_result=_frees_result,
    activations=("x", "gain"),
)
