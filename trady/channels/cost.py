"""What a selection takes and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable


@dataclass(frozen=True)
class Cost:
    """What a selection takes, and what it saves compared with updating every channel of every layer.

    Attributes:
        channels: Selected input channels.
        elements: Sum of C^W + C^A, elements for one sample (B_mem).
        saved_channel_bytes: Activations of the selected channels, for the full batch.
        compact_bytes: Weight elements of the selected channels in bytes: the size of the compact
            parameters, and again of their gradients.
        update_bytes: What updating adds to a frozen forward and backward: saved channels, compact
            parameters, their gradients, optimizer state and what a policy keeps to compare with, and the float
            channels of quantised layers.
        flops: Weight-gradient multiply-adds of one sample.
        weight_sparsity: Share of weight elements without a gradient.
        activation_sparsity: Share of layer inputs that is not saved.
        flops_reduction: Share of the weight-gradient multiply-adds that is not executed.
        float_bytes: Reserved for the channels of quantised layers that stay in floating point once they have trained.
    """

    channels: int
    elements: int
    saved_channel_bytes: int
    compact_bytes: int
    update_bytes: int
    flops: int
    weight_sparsity: float
    activation_sparsity: float
    flops_reduction: float
    float_bytes: int = 0


def cost_of(table: ChannelTable, selection: Selection, state_copies: int = 0, float_bytes: int = 0) -> Cost:
    """Account for a selection (arXiv 2510.19675, section 3 and table 1).

    Args:
        table: The layers.
        selection: Channels that train.
        state_copies: Copies of a parameter kept beside it: the optimizer's state, and the snapshot of a policy that
            compares with earlier weights.
        float_bytes: What the float channels of quantised layers take.

    """
    weights, activations = table.weight_elements(selection), table.activation_elements(selection)
    flops, saved = table.flops(selection), table.saved_bytes(selection)
    compact = weights * table.weight_element_bytes

    def sparsity(kept: int, total: int) -> float:
        return 1.0 - kept / total if total else 1.0

    return Cost(
        channels=selection.count,
        elements=weights + activations,
        saved_channel_bytes=saved,
        compact_bytes=compact,
        update_bytes=saved + compact * (2 + state_copies) + float_bytes,
        flops=flops,
        weight_sparsity=1.0 - table.weight_share(selection),
        activation_sparsity=sparsity(activations, sum(layer.channels * layer.activation_elements for layer in table)),
        flops_reduction=sparsity(flops, sum(layer.channels * layer.flops for layer in table)),
        float_bytes=float_bytes,
    )


@dataclass(frozen=True)
class Sparsity:
    """What a training leaves out, averaged over draws: channels change, so one draw says little.

    Attributes:
        draws: Number of draws, from epoch 0 on.
        weight: Mean share of weight elements without a gradient.
        activation: Mean share of layer inputs that is not saved.
        flops: Mean share of the weight-gradient multiply-adds that is not executed.
    """

    draws: int
    weight: float
    activation: float
    flops: float

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> Sparsity:
        """Average over draws."""
        return cls(
            len(costs),
            fmean(cost.weight_sparsity for cost in costs),
            fmean(cost.activation_sparsity for cost in costs),
            fmean(cost.flops_reduction for cost in costs),
        )
