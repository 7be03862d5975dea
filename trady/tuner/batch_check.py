"""Says so, once, when a batch is larger than the one that the plan was made for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from trady.errors import TradyWarning
from trady.model.batch import Batch
from trady.model.hooks import Hook


class BatchCheck:
    """Looks at every batch of the prepared model until one is too large.

    Args:
        model: The model.
        elements: Elements of the batch that the plan was made for.

    """

    def __init__(self, model: nn.Module, elements: int) -> None:
        self._planned = elements
        self._active = True
        self._handle = model.register_forward_pre_hook(Hook(self._look), with_kwargs=True)

    def _look(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._active or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        elements = Batch((args, kwargs)).elements
        if elements > self._planned:
            self._active = False
            warnings.warn(
                f"this batch has {elements} elements, and the plan was made for one of {self._planned}: the step may "
                "take more than the budget. Prepare with the largest batch that training will see",
                TradyWarning,
                stacklevel=3,
            )

    def remove(self) -> None:
        """Take the hook out."""
        self._handle.remove()
