"""Clipping that lets one learning rate serve every network.

Frozen normalisation makes the rate delicate: nothing rescales a weight whose update was too large. What is
too large depends on the weight, so the gradient of a channel is held against the channel itself (adaptive
gradient clipping, Brock et al. 2021, arXiv 2102.06171, there per output unit, here per input channel):

    g_c <- g_c * min(1, ratio * max(||W[:, c]||, 1e-3) / ||g_c||)

A step of plain SGD then moves no channel by more than ``lr * ratio`` of its norm. The head, which starts from
random weights, is clipped by its gradient norm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: Channels whose norm is below this count as this large, so that zero weights can learn.
_LEAST_NORM = 1e-3


def clip_channels_(compact: Iterable[nn.Parameter], ratio: float) -> None:
    """Clip the gradient of every selected channel to ``ratio`` times the channel's own norm, in place.

    Args:
        compact: Compact parameters [channels, output channels a group, *kernel] with their gradients.
        ratio: Largest gradient norm over weight norm.

    """
    for parameter in compact:
        if parameter.grad is None or parameter.numel() == 0:
            continue
        limit = ratio * _row_norms(parameter.detach()).clamp_(min=_LEAST_NORM)
        factor = (limit / _row_norms(parameter.grad).clamp_(min=torch.finfo(torch.float32).tiny)).clamp_(max=1.0)
        parameter.grad.mul_(factor.view(-1, *(1,) * (parameter.dim() - 1)).to(parameter.dtype))


def _row_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32)
    return norms
