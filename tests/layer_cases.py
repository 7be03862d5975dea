"""A lean layer beside its dense twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trady.ops.bits import Clamp
from trady.ops.layer import LayerCall, layer
from trady.ops.operators import Convolution, Linear
from trady.ops.selected import channel_major, gather_channels, select_channels

CLAMPS = {
    "none": None,
    "relu": Clamp(0.0),
    "relu6": Clamp(0.0, 6.0),
    "hardtanh": Clamp(-0.5, 0.5),
    "leaky": Clamp(0.0, math.inf, 0.1),
}


#: name -> (dimensions, stride, padding, dilation, groups, pad, kernel, spatial size)
CONVOLUTIONS = {
    "conv1d": (1, (1,), (0,), (1,), 1, (), (3,), (7,)),
    "conv1d strided dilated": (1, (2,), (2,), (2,), 2, (), (3,), (8,)),
    "conv1d pad": (1, (2,), (0,), (1,), 1, (2, 0), (4,), (7,)),
    "conv2d": (2, (1, 1), (1, 1), (1, 1), 1, (), (3, 3), (5, 4)),
    "conv2d strided": (2, (2, 1), (1, 0), (1, 1), 1, (), (3, 2), (6, 5)),
    "conv2d dilated": (2, (1, 1), (2, 2), (2, 2), 1, (), (3, 3), (5, 5)),
    "conv2d grouped": (2, (1, 2), (1, 1), (1, 1), 3, (), (3, 3), (4, 5)),
    "conv2d depthwise": (2, (2, 2), (1, 1), (1, 1), 6, (), (3, 3), (5, 5)),
    "conv2d uneven pad": (2, (2, 2), (0, 0), (1, 1), 1, (0, 1, 1, 2), (3, 3), (5, 4)),
    "conv2d uneven pad depthwise": (2, (1, 1), (0, 0), (1, 1), 6, (1, 0, 0, 1), (2, 2), (4, 4)),
    "pointwise": (2, (1, 1), (0, 0), (1, 1), 1, (), (1, 1), (9, 8)),
    "pointwise strided": (2, (2, 2), (0, 0), (1, 1), 1, (), (1, 1), (5, 4)),
    "pointwise grouped": (2, (1, 1), (0, 0), (1, 1), 2, (), (1, 1), (4, 4)),
    "conv3d": (3, (1, 2, 1), (1, 0, 1), (1, 1, 1), 1, (), (2, 3, 2), (3, 5, 3)),
    "conv3d grouped": (3, (1, 1, 1), (1, 1, 1), (1, 1, 1), 2, (), (3, 1, 2), (3, 3, 3)),
}  # fmt: skip


class Case:
    """A layer call with its dense twin in plain PyTorch."""

    def __init__(
        self,
        name: str,
        *,
        clamp: str = "none",
        norm: bool = False,
        dtype: torch.dtype = torch.float64,
        channels: tuple[int, ...] = (0, 1, 4),
        batch: int = 2,
        seed: int = 0,
        bias: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.clamp, self.inputs, outputs = CLAMPS[clamp], 6, 12
        if name in CONVOLUTIONS:
            _, stride, padding, dilation, groups, pad, kernel, size = CONVOLUTIONS[name]
            self.map: Convolution | Linear = Convolution(stride, padding, dilation, groups, pad)
            self.weight = normal(outputs, self.inputs // groups, *kernel) / 3
            self.x = normal(batch, self.inputs, *size)
        else:
            self.map = Linear(input_major=name == "addmm")
            self.weight = normal(self.inputs, outputs) if name == "addmm" else normal(outputs, self.inputs)
            self.x = normal(batch, self.inputs) if norm or name == "addmm" else normal(batch, 3, self.inputs)
        groups = self.map.groups
        self.selected = select_channels(np.array(channels), groups, self.inputs // groups, torch.device("cpu"))
        self.bias = normal(outputs) if bias else None
        self.scale = (normal(outputs).abs() + 0.5) if norm else None
        self.shift = normal(outputs) if norm else None
        self.compact = gather_channels(self.weight, self.map.kind, groups, self.selected).requires_grad_()
        self.x.requires_grad_()

    def lean(self, x: Tensor, compact: Tensor) -> Tensor:
        call = LayerCall(self.map, self.selected, self.clamp)
        return layer(x, compact, call, self.weight, self.bias, self.scale, self.shift)

    def dense(self, x: Tensor, compact: Tensor) -> Tensor:
        weight = self.weight.clone()
        channel_major(weight, self.map.kind, self.map.groups)[self.selected.group, self.selected.channel] = compact
        if isinstance(self.map, Linear):
            y = (
                x @ weight + (0 if self.bias is None else self.bias)
                if self.map.input_major
                else F.linear(x, weight, self.bias)
            )
        else:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.map.stride) - 1]
            x = F.pad(x, self.map.pad) if self.map.pad else x
            y = convolve(x, weight, self.bias, self.map.stride, self.map.padding, self.map.dilation, self.map.groups)
        if self.scale is not None and self.shift is not None:
            along = (1, -1, *(1,) * (y.dim() - 2))
            y = y * self.scale.view(along) + self.shift.view(along)
        if self.clamp is None:
            return y
        return F.leaky_relu(y, self.clamp.slope) if self.clamp.slope else y.clamp(self.clamp.low, self.clamp.high)

    def gradients(self, function: Any, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y = function(self.x, self.compact)
        upstream = (
            torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view(y.shape)
            if upstream is None
            else upstream
        )
        return (y.detach(), *torch.autograd.grad(y, [self.x, self.compact], upstream))


def noting(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook for saved tensors that notes them."""

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    return note


LAYERS = [*CONVOLUTIONS, "linear", "addmm"]


def close(left: Any, right: Any, tolerance: float = 1e-11) -> bool:
    return all((a - b).norm() <= tolerance * (1 + b.norm()) for a, b in zip(left, right, strict=True))
