"""Are the gradients of the selected channels those of the dense model?"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import trady
from benchmarks.workloads import Workload
from trady.estimates.heads import train_with_fixed_statistics
from trady.ops.selected import channel_major


# By default, convolutions on CUDA round to ten bits of mantissa: both sides of the comparison, each its own way.
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def gradient_errors(
    workload: Workload,
    models: Path,
    seed: int = 0,
    *,
    recompute: str = "auto",
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Compare one backward pass of TraDy with one of the plain model: same mode, same batch, same weights.

    Args:
        workload: The workload; its model is built twice.
        models: Folder of the backbones.
        seed: Seed of the draw.
        recompute: As in :func:`trady.prepare`.
        autocast: What both models' forward passes run in under autocast; ``None`` is without it.

    Returns:
        For every layer with selected channels ‖g - d‖ / ‖d‖, g the gradient of its selected channels and
        d those channels of the dense gradient (of standardised filters, its part that leaves their statistics).

    """
    dense, sparse = workload.make(models), workload.make(models)
    train_with_fixed_statistics(dense.model.requires_grad_(True))
    device = next(dense.model.parameters()).device.type
    torch.manual_seed(seed)  # layers that are dropped at random are the same ones in both
    with torch.autocast(device, autocast, enabled=autocast is not None):
        loss = dense.run()
    loss.backward()
    with torch.autocast(device, autocast, enabled=autocast is not None):
        tuner = workload.arm(sparse, seed, recompute=recompute)
    try:
        sparse.model.train()
        torch.manual_seed(seed)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = sparse.run()
        loss.backward()
        return layer_errors(dense.model, tuner)
    finally:
        tuner.finish()


def layer_errors(dense: nn.Module, tuner: trady.Tuner) -> dict[str, float]:
    """Compare the gradients that a backward pass has left in the plain model and in an armed one.

    Returns:
        As :func:`gradient_errors`; without layers that no gradient reaches, infinity where it reaches one of the two.

    """
    compact, errors = {name: parameter.grad for name, parameter in tuner.named_parameters()}, {}
    for name, channels in tuner.selection.items():
        layer = tuner.plan.table[name]
        whole, got = dense.get_parameter(layer.parameter).grad, compact[f"{layer.parameter}.channels"]
        if whole is None or got is None:
            unlike = (whole is not None and bool(whole.any())) or (got is not None and bool(got.any()))
            errors.update({name: math.inf} if unlike else {})
            continue
        index = torch.from_numpy(channels.copy()).to(whole.device)
        wanted = channel_major(whole, layer.kind, layer.groups).flatten(0, 1)[index]
        if layer.standardised:
            weight = channel_major(dense.get_parameter(layer.parameter).detach(), layer.kind, layer.groups)
            wanted = _at_fixed_statistics(wanted, weight.flatten(0, 1)[index], index, weight.shape[1])
        norm = float(wanted.norm())
        errors[name] = float((got - wanted).norm()) / norm if norm else float(got.norm() > 0)
    return errors


def _at_fixed_statistics(gradient: Tensor, weight: Tensor, channels: Tensor, channels_a_group: int) -> Tensor:
    """Take from the gradient of each filter what changes its mean or its variance, by least squares.

    Args:
        gradient: The dense one of the selected channels, [n, output channels a group, *kernel].
        weight: The same channels of the weight.
        channels: Their indices, [n].
        channels_a_group: Input channels that a filter has; where all are selected, nothing is taken.

    """
    left = gradient.clone()
    for group in (channels // channels_a_group).unique():
        rows = channels // channels_a_group == group
        if int(rows.sum()) == channels_a_group:
            continue
        g, w = (t[rows].flatten(2).transpose(0, 1).flatten(1).double() for t in (gradient, weight))
        basis = torch.linalg.qr(torch.stack([torch.ones_like(w), w], dim=2)).Q
        g = g - (basis @ (basis.mT @ g.unsqueeze(2))).squeeze(2)
        left[rows] = g.view(g.shape[0], int(rows.sum()), -1).transpose(0, 1).reshape(left[rows].shape).to(left)
    return left
