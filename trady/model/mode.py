"""Training mode, buffers and sections of a model, kept as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

#: Whether a trace is running: a model that trains already is traced as its author wrote it.
tracing: ContextVar[bool] = ContextVar("tracing", default=False)


#: What tells a section that is recomputed, or runs without gradients, from its surroundings.
Section = tuple[int, bool]


def current_section() -> Section:
    """Identify the checkpointed section, or the segment without gradients, that is running."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (0 if hooks is None else id(hooks[0])), torch.is_grad_enabled()


@contextmanager
def kept_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Context that leaves the flags and buffers of a model as they were, with the model in this mode meanwhile."""
    flags = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, flag, buffers in flags:
            module.training = flag
            module._buffers.update(buffers)  # `self.steps += 1` has put one without memory there
