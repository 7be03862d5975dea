"""Convolutions whose filters are standardised in the forward pass, as NFNet and BiT have them.

A filter ``w`` of N weights enters the convolution as ``gain * (w - mean(w)) / sqrt(var(w) + eps)`` (weight
standardisation, arXiv 1903.10520; scaled, arXiv 2101.08692), so its mean and variance couple all of its input channels.
The dense gradient subtracts from ``g``, the gradient of the standardised filter, its components along ``1`` and ``w``:

    dL/dw = gain / sqrt(var + eps) * (g - mean(g) - h * mean(g * h)),    h = (w - mean(w)) / sqrt(var + eps)

These two means run over all channels, and the channels that do not train have no ``g``. The selected channels of a
filter therefore train with its statistics held: the dense gradient of these channels, projected onto the directions in
which mean and variance of the filter stay as they are (to first order). The projection takes two numbers a filter from
the dense gradient, a step along its negative goes downhill in the dense loss, and nothing more is saved for it. Where
all channels of a filter train (every selected channel of a depthwise convolution, ``policy="full"``), both means are
there, and the gradient is the dense one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from trady.ops.selected import SelectedChannels, channel_major, gather_channels

_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


def standardise(weight: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Standardise every filter of a weight [O, C / groups, *kernel], and multiply it by its gain [O]."""
    flat = weight.reshape(1, weight.shape[0], -1)
    hat = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=eps)
    return hat.view(weight.shape)


def standardised_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with standardised filters; modes see it as one torch function."""
    if has_torch_function_unary(x):
        options = (bias, gain, eps, stride, padding, dilation, groups)
        out: Tensor = handle_torch_function(standardised_convolution, (x,), x, weight, *options)
        return out
    convolve: Any = _CONVOLUTIONS[weight.dim()]
    made: Tensor = convolve(x, standardise(weight, gain, eps), bias, stride, padding, dilation, groups)
    return made


def raw_gradient_(
    gradient: Tensor, weight: Tensor, eps: float, kind: str, groups: int, selected: SelectedChannels
) -> Tensor:
    """Turn the gradient of standardised channels into that of the weight's; in place.

    Args:
        gradient: Of the selected channels of the standardised filters, [n, selected output channels a group, *kernel].
        weight: The weight, [O, C / groups, *kernel].
        eps: Added to the variance.
        kind: Of the convolution.
        groups: Of the convolution.
        selected: The channels.

    Returns:
        ``gradient``.

    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    variance, mean = torch.var_mean(weight.flatten(1).to(wide), 1, correction=0)
    inverse = variance.add_(eps).rsqrt_()
    outputs = slice(None) if selected.outputs is None else selected.outputs
    mean, inverse = (of_filter.view(groups, -1)[:, outputs] for of_filter in (mean, inverse))
    row = selected.group
    kernel = weight[0, 0].numel()
    # Of each group: selected weights of a filter, and whether these are all that it has.
    count = torch.zeros(groups, dtype=wide, device=weight.device)
    count = count.index_add_(0, row, count.new_full((1,), kernel).expand(len(row))).unsqueeze_(1)
    every = channel_major(weight, kind, groups).shape[1] * kernel

    def total(rows: Tensor) -> Tensor:
        """Sum [n, m, kernel] over the selected weights of each filter: [groups, m]."""
        return rows.new_zeros(groups, rows.shape[1]).index_add_(0, row, rows.sum(2))

    g = gradient.flatten(2).to(wide)
    hat = gather_channels(weight, kind, groups, selected).flatten(2).to(wide)
    hat.sub_(mean[row].unsqueeze_(2)).mul_(inverse[row].unsqueeze_(2))
    hat.sub_((total(hat) / count)[row].unsqueeze_(2))
    g.sub_((total(g) / count)[row].unsqueeze_(2))
    along, length = total(g * hat), total(hat.square())
    length = torch.where(count == every, count.expand_as(length), length)
    share = torch.where(length > 0, along / length, 0.0)
    g.addcmul_(hat, share[row].unsqueeze_(2), value=-1).mul_(inverse[row].unsqueeze_(2))
    return gradient if wide is gradient.dtype else gradient.copy_(g.view_as(gradient))
