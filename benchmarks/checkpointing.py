"""Gradient checkpointing (arXiv 1604.06174): a block keeps its input and runs again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.skipped import SkippedError


def checkpoint_blocks(model: nn.Module, classes: tuple[str, ...]) -> str:
    """Recompute every block of a model from now on.

    Args:
        model: Changed in place. A model of transformers that has a switch of its own uses that.
        classes: Class names of the blocks of any other model.

    Returns:
        What is recomputed, for people.

    Raises:
        SkippedError: There is neither a switch nor a block of these classes.

    """
    if getattr(model, "supports_gradient_checkpointing", False):
        # The later versions of transformers warn of the first name.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
        return f"the model's own {kind}_checkpointing_enable"
    blocks = [module for module in model.modules() if type(module).__name__ in classes]
    if not blocks:
        raise SkippedError("the model has no switch for checkpointing, and no blocks are named for it")
    for module in blocks:
        # Batch normalisation in training mode sees each batch twice: its running statistics move faster.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return f"torch.utils.checkpoint around each of {len(blocks)} {' and '.join(classes)}"
