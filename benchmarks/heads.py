"""What is the head of a network, and the mode in which a frozen network trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the last linear layer; ``None`` where its weight is tied to another module's."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        return None
    owners = [module for module in model.modules() if any(p is linear[-1].weight for p in module.parameters(False))]
    return linear[-1] if len(owners) == 1 else None


def train_with_fixed_statistics(model: nn.Module) -> None:
    """Training mode, so that dropout is as in full fine-tuning; batch normalisation in evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
