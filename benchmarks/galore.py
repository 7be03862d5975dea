"""GaLore (arXiv 2403.03507) by galore-torch: Adam whose moments live in a subspace of the gradient.

Saved activations and gradients are those of full fine-tuning; only the optimizer's state is smaller.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.skipped import SkippedError
from benchmarks.tasks import needs
from trady.estimates.heads import head_of

#: Of the projections; half of the smallest dimension where a weight is smaller than twice that.
RANK = 128

#: The documented defaults of galore-torch.
UPDATE_PROJECTION_EVERY, SCALE = 200, 0.25


def galore_optimizer(model: nn.Module, rate: float) -> tuple[torch.optim.Optimizer, str]:
    """Make the optimizer: linear weights are projected, everything else gets a plain AdamW.

    Args:
        model: Whose parameters it steps.
        rate: Learning rate.

    Returns:
        The optimizer, and what it projects, for people.

    Raises:
        SkippedError: The network has no linear layer but its head.
        MissingPackageError: galore-torch is not installed.

    """
    head = head_of(model)
    weights = [
        module.get_parameter("weight")
        for module in model.modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [weight for weight in weights if id(weight) not in embeddings]
    if not weights:
        raise SkippedError("GaLore projects linear weights, and this network has none but its head")
    groups: dict[int, list[nn.Parameter]] = {}
    for weight in weights:
        groups.setdefault(min(RANK, min(weight.shape) // 2), []).append(weight)
    projected = {id(weight) for weight in weights}
    optimizer = needs("galore_torch", "benchmarks").GaLoreAdamW(
        [
            {"params": [parameter for parameter in model.parameters() if id(parameter) not in projected]},
            *(
                {
                    "params": members,
                    "rank": rank,
                    "update_proj_gap": UPDATE_PROJECTION_EVERY,
                    "scale": SCALE,
                    "proj_type": "std",
                }
                for rank, members in groups.items()
            ),
        ],
        lr=rate,
        no_deprecation_warning=True,
    )
    ranks = ", ".join(str(rank) for rank in sorted(groups))
    return (
        optimizer,
        f"AdamW; {len(weights)} linear weights projected to ranks {ranks}; the step that projects again "
        f"(every {UPDATE_PROJECTION_EVERY}th) is not in the figures",
    )
