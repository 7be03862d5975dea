"""Gradient checkpointing (arXiv 1604.06174): a block keeps its input and runs again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from trady.estimates.heads import blocks_of
from trady.estimates.unsuitable import UnsuitableMethodError


def checkpoint_blocks(model: nn.Module, classes: tuple[str, ...] = ()) -> str:
    """Recompute every block of a model from now on.

    Args:
        model: Changed in place. A model of transformers or timm that has a switch of its own uses that.
        classes: Class names of the blocks of any other model; without any, those that
            :func:`trady.estimates.heads.blocks_of` finds.

    Returns:
        What is recomputed, for people.

    Raises:
        UnsuitableMethodError: There is neither a switch nor a block of these classes.

    """
    if getattr(model, "supports_gradient_checkpointing", False):
        # The later versions of transformers warn of the first name.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
        return f"the model's own {kind}_checkpointing_enable"
    if callable(switch := getattr(model, "set_grad_checkpointing", None)) and not classes:
        switch(True)
        return "the model's own set_grad_checkpointing"
    blocks = blocks_of(model, classes)
    if not blocks:
        raise UnsuitableMethodError(
            "the model has no switch for checkpointing, and no blocks "
            + (f"of class {' or '.join(classes)}" if classes else "that repeat")
        )
    for module in blocks:
        # Batch normalisation in training mode sees each batch twice: its running statistics move faster.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    names = dict.fromkeys(type(module).__name__ for module in blocks)
    return f"torch.utils.checkpoint around each of {len(blocks)} {' and '.join(names)}"
