"""The three products of a weight layer: forward, gradient of the input, gradient of chosen channels."""

# N samples, C input channels, O output channels, P positions (all spatial dimensions), R rows (all dimensions before
# the last of a linear layer's input), n selected input channels: x_NCP, gradient_NOP, x_RC, gradient_RO, total_nO.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.ops.context import device_type
from trady.ops.layout import chunks, empty_like_batch, memory_format, take, unviewed
from trady.ops.native import depthwise, unwritten
from trady.ops.rows import multiply_rows
from trady.ops.selected import SelectedChannels

_convolution_backward = torch.ops.aten.convolution_backward.default

#: Samples from which on PyTorch's pointwise convolution reorders its full input, which is expensive with strides.
_REORDERED_SAMPLES = 16

#: Positions of the output (height times width) from which on such a convolution is computed as a matrix product.
_MATRIX_POSITIONS = 64

_STRIDED_MATRIX_POSITIONS = 512

_STRIDED_MATRIX_POSITIONS_BACKWARD = 128

#: The same for the gradient of the input of fewer samples, which never is quick otherwise.
_FEW_SAMPLES_MATRIX_POSITIONS_BACKWARD = 4

#: Outputs up to this size stay in the processor's cache between adding a bias and the product.
_CACHED_BYTES = 8 << 20

#: Products up to which a linear layer is limited by calls, not by arithmetic.
_FEW_PRODUCTS = 1 << 24

#: Kernel height up to which oneDNN's weight gradients are right (:func:`_without_onednn`).
_TALLEST_OF_ONEDNN = 32


class WeightOperator(Protocol):
    """A layer that is linear in its input and in its weight."""

    @property
    def kind(self) -> str:
        """Name of the kind."""
        ...

    @property
    def channel_dim(self) -> int:
        """Dimension of the input that holds the input channels."""
        ...

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for linear layers."""
        ...

    @property
    def pad(self) -> tuple[int, ...]:
        """Zero padding that differs between sides, in the order of ``F.pad``; empty for none."""
        ...

    def output_channels(self, weight: Tensor) -> int:
        """How many output channels a weight has."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer to a batch."""
        ...

    def input_gradient(self, gradient: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        """Gradient of the input, of shape ``input_shape``; maybe a view into a padded one."""
        ...

    def weight_gradient(self, gradient: Tensor, inputs: Tensor, selected: SelectedChannels, out: Tensor) -> None:
        """Add the gradient of the selected channels to ``out`` [n, selected output channels a group, *kernel].

        ``gradient`` holds the selected output channels and ``inputs`` the selected input channels only, in
        their order.
        """
        ...

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply every output channel of the weight by its scale (a folded normalisation)."""
        ...


@dataclass(frozen=True)
class Convolution:
    """A convolution over 1, 2 or 3 spatial dimensions.

    ``pad`` is zero padding in front of it that differs between the two sides of a dimension, in the
    order of ``torch.nn.functional.pad``. It is never stored: it is made and dropped in chunks of samples.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...] = ()
    channel_dim: int = 1

    @cached_property
    def _strided(self) -> bool:
        return any(s != 1 for s in self.stride)

    @property
    def kind(self) -> str:
        """``conv1d``, ``conv2d`` or ``conv3d``."""
        return f"conv{len(self.stride)}d"

    def output_channels(self, weight: Tensor) -> int:
        """How many output channels a weight [O, C / groups, *kernel] has."""
        return weight.shape[0]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the convolution; x: [N, C, *spatial]."""
        sides = self._depthwise(x.shape, weight.shape)
        if sides is not None and (quick := depthwise.forward(x, weight, bias, sides)) is not None:
            return quick
        if not self.pad:
            return self._convolve(x, weight, bias)
        out: Tensor | None = None
        for chunk in chunks(x.shape[0], _bytes_a_sample(x)):
            made = self._convolve(F.pad(x[chunk], self.pad), weight, bias)
            if made.shape[0] == x.shape[0]:
                return made
            if out is None:
                out = empty_like_batch(made, x.shape[0])
            out[chunk].copy_(made)
        return out if out is not None else self._convolve(F.pad(x, self.pad), weight, bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        strided = self._strided
        if (strided or x.shape[0] >= _REORDERED_SAMPLES) and self._is_matrix_product(x, weight):
            positions = torch.Size(-(-n // s) for n, s in zip(x.shape[2:], self.stride, strict=True))
            if positions.numel() >= (_STRIDED_MATRIX_POSITIONS if strided else _MATRIX_POSITIONS):
                return self._multiply(x, weight, bias, positions)
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.stride) - 1]
        return _laid_out(convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups), x, weight)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, positions: torch.Size) -> Tensor:
        """Compute a pointwise convolution as a matrix product, at every stride-th position."""
        samples, outputs = x.shape[0], weight.shape[0]
        out = unwritten(x.new_empty((samples, outputs, *positions)))
        out_NOP = out.flatten(2)
        weight_1OC = weight.view(1, *weight.shape[:2])
        strided = positions != x.shape[2:]
        read = self._every_stride(x)
        at_once = not strided and (bias is None or out_NOP.numel() * out_NOP.element_size() <= _CACHED_BYTES)
        bytes_a_sample = _bytes_a_sample(out_NOP) if not strided else _bytes_a_sample(read)
        for chunk in [slice(0, samples)] if at_once else chunks(samples, bytes_a_sample):
            x_NCP = read[chunk].flatten(2)
            weight_NOC = weight_1OC.expand(x_NCP.shape[0], -1, -1)
            if bias is None:
                torch.bmm(weight_NOC, x_NCP, out=out_NOP[chunk])
            else:
                torch.baddbmm(bias.view(1, -1, 1), weight_NOC, x_NCP, out=out_NOP[chunk])
        return out

    def _every_stride(self, x: Tensor) -> Tensor:
        """View the positions that a pointwise convolution reads."""
        return x[(slice(None), slice(None), *(slice(None, None, s) for s in self.stride))]

    def _is_matrix_product(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a pointwise convolution can be computed as a matrix product.

        On the CPU the convolution of many samples reorders its full input and output, and the matrix product is 1.3 to
        4 times as fast where there are enough positions; with few it is slower.
        """
        return (
            self.groups == 1
            and not self.pad
            and x.dtype in (torch.float32, torch.float64)
            and device_type(x) == "cpu"
            and self._is_pointwise(weight.shape[2:])
            and x.is_contiguous()
            and weight.is_contiguous()
            and x.shape[0] > 0
        )

    def input_gradient(self, gradient: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        """Gradient of the input; gradient: [N, O, *spatial of the output]."""
        sides = self._depthwise(input_shape, weight.shape)
        if sides is not None:
            quick = depthwise.input_gradient(gradient, weight, input_shape, sides)
            if quick is not None:
                return quick
        strided = self._strided
        few = _FEW_SAMPLES_MATRIX_POSITIONS_BACKWARD if gradient.shape[0] < _REORDERED_SAMPLES else _MATRIX_POSITIONS
        enough = _STRIDED_MATRIX_POSITIONS_BACKWARD if strided else few
        if self._is_matrix_product(gradient, weight) and gradient.shape[2:].numel() >= enough:
            return self._multiply_back(gradient, weight, input_shape)
        made = self._transposed(gradient, weight, _padded_shape(input_shape, self.pad))
        for axis, before in enumerate(self.pad[::2]):
            made = made.narrow(-1 - axis, before, input_shape[-1 - axis])
        return made

    def _transposed(self, gradient: Tensor, weight: Tensor, input_shape: tuple[int, ...]) -> Tensor:
        """Gradient of the input; on the CPU, PyTorch's own backward would copy the input although it never reads it."""
        transpose = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(self.stride) - 1]
        sides = zip(input_shape[2:], gradient.shape[2:], weight.shape[2:], strict=True)
        steps = zip(self.stride, self.padding, self.dilation, strict=True)
        unreached = tuple(  # positions after the last one that a strided kernel reads
            size - ((outputs - 1) * s - 2 * p + d * (k - 1) + 1)
            for (size, outputs, k), (s, p, d) in zip(sides, steps, strict=True)
        )
        made = transpose(gradient, weight, None, self.stride, self.padding, unreached, self.groups, self.dilation)
        return _laid_out(made, gradient, weight)

    def _multiply_back(self, gradient: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        weight_1CO = weight.view(1, *weight.shape[:2]).transpose(1, 2)
        gradient_NOP, samples = gradient.flatten(2), input_shape[0]
        made = unwritten(gradient.new_empty(input_shape))
        if input_shape[2:] == gradient.shape[2:]:
            torch.bmm(weight_1CO.expand(samples, -1, -1), gradient_NOP, out=made.view(*input_shape[:2], -1))
            return made
        read = self._every_stride(made.zero_())
        for chunk in chunks(samples, _bytes_a_sample(read)):
            weight_NCO = weight_1CO.expand(chunk.stop - chunk.start, -1, -1)
            read[chunk] = torch.bmm(weight_NCO, gradient_NOP[chunk]).view_as(read[chunk])
        return made

    def _depthwise(self, inputs: torch.Size, weight: torch.Size) -> tuple[int, ...] | None:
        """Geometry for the depthwise kernels; ``None`` for other convolutions."""
        if self.groups == 1 or self.groups != weight[0] or weight[1] != 1:
            return None
        return depthwise.geometry(inputs, weight, self.stride, self.padding, self.dilation, self.pad)

    def weight_gradient(self, gradient: Tensor, inputs: Tensor, selected: SelectedChannels, out: Tensor) -> None:
        """Add the gradient of the selected channels to ``out``."""
        if out.shape[1] == 1 and self.groups == gradient.shape[1]:
            shape = torch.Size((gradient.shape[0], self.groups, *inputs.shape[2:]))
            sides = self._depthwise(shape, torch.Size((self.groups, *out.shape[1:])))
            if sides is not None and depthwise.add_weight_gradient(gradient, inputs, selected.index, out, sides):
                return
        if self.pad:
            inputs = F.pad(inputs, self.pad)
        if self.groups == 1 and self._is_pointwise(out.shape[2:]):
            x_NnP, gradient_NPO = self._every_stride(inputs).flatten(2), gradient.flatten(2).transpose(1, 2)
            total_nO = out.view(out.shape[:2])
            for chunk in chunks(x_NnP.shape[0], total_nO.numel() * x_NnP.element_size()):
                total_nO.add_(torch.bmm(x_NnP[chunk], gradient_NPO[chunk]).sum(0))
            return
        for block in selected.blocks:
            x = inputs if block.positions is None else take(inputs, 1, block.positions)
            g = gradient
            if block.groups is not None:
                g = take(gradient.unflatten(1, (self.groups, -1)), 1, block.groups).flatten(1, 2)
            outputs = out.shape[1]
            kernels = (block.group_count * outputs, block.channels_a_group, *out.shape[2:])
            weight = torch.empty(kernels, dtype=x.dtype, device=x.device, memory_format=memory_format(g))
            geometry = (self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), block.group_count)
            operands = [_without_onednn(t, out.shape[2:]) for t in (g, x, weight)]
            made = _convolution_backward(*operands, None, *geometry, (False, True, False))[1]
            made = made.unflatten(0, (block.group_count, outputs)).transpose(1, 2).flatten(0, 1)
            if block.positions is None:
                out.add_(made)
            else:
                out.index_add_(0, block.positions, made.to(out.dtype))

    def _is_pointwise(self, kernel: torch.Size) -> bool:
        return not any(self.padding) and kernel.numel() == 1

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply every output channel by its scale."""
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1))


@dataclass(frozen=True)
class Linear:
    """A linear layer over the last dimension; ``input_major`` weights are [in, out] (``addmm``)."""

    input_major: bool = False
    channel_dim: int = -1
    groups: int = 1
    pad: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """``linear`` or ``addmm``."""
        return "addmm" if self.input_major else "linear"

    def output_channels(self, weight: Tensor) -> int:
        """How many output features a weight has."""
        return weight.shape[1 if self.input_major else 0]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer; x: [..., in]."""
        if not self.input_major and x.numel() * weight.shape[0] < _FEW_PRODUCTS:
            return unviewed(F.linear(x, weight, bias))  # with a bias, it is a view of a matrix
        x_RC, weight_CO = x.reshape(-1, x.shape[-1]), weight if self.input_major else weight.t()
        outputs = weight_CO.shape[1]
        out = unwritten(x.new_empty((*x.shape[:-1], outputs)))  # no view: a model may write into it
        out_RO = out.view(-1, outputs)
        if bias is None:
            torch.mm(x_RC, weight_CO, out=out_RO)
        else:
            torch.addmm(bias, x_RC, weight_CO, out=out_RO)
        return out

    def input_gradient(self, gradient: Tensor, weight: Tensor, input_shape: torch.Size) -> Tensor:
        """Gradient of the input; gradient: [..., out]."""
        return multiply_rows(gradient, weight.t() if self.input_major else weight)

    def weight_gradient(self, gradient: Tensor, inputs: Tensor, selected: SelectedChannels, out: Tensor) -> None:
        """Add the gradient of the selected channels to ``out`` [n, out]."""
        out.add_(self.channel_gradient(gradient, inputs))

    def channel_gradient(self, gradient: Tensor, inputs: Tensor) -> Tensor:
        """Return the gradient [n, out] of the channels that ``inputs`` [..., n] holds."""
        x_Rn, gradient_RO = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        return x_Rn.t() @ gradient_RO

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply every output feature by its scale."""
        return weight * (scale if self.input_major else scale.unsqueeze(-1))


def _laid_out(made: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The result of a convolution of ``x``; a fake tensor in the layout that the real one would have."""
    layout = memory_format(x)
    layout = memory_format(weight) if layout is torch.contiguous_format else layout
    if not made.is_meta or layout is torch.contiguous_format or memory_format(made) is layout:
        return made
    samples, channels, *spatial = made.shape
    return made.view(samples, *spatial, channels).movedim(-1, 1)


def _without_onednn(tensor: Tensor, kernel: torch.Size) -> Tensor:
    """The tensor in float64 where oneDNN must not compute with it, which does not take float64.

    oneDNN's weight gradients of depthwise convolutions are off by a tenth for kernels of 41 rows and more, and it
    reads memory that is not its own (PyTorch 2.13 with AVX-512).
    """
    wrong = max(kernel) > _TALLEST_OF_ONEDNN and device_type(tensor) == "cpu"
    return tensor.double() if wrong else tensor


def _padded_shape(shape: torch.Size, pad: tuple[int, ...]) -> tuple[int, ...]:
    padded = list(shape)
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        padded[-1 - axis] += before + after
    return tuple(padded)


def _bytes_a_sample(x: Tensor) -> int:
    return x.element_size() * x.numel() // max(1, x.shape[0])
