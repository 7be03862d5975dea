"""Whether a trace is running, and in which section of a model."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

#: Whether a trace is running: a model that trains already is traced as its author wrote it.
tracing: ContextVar[bool] = ContextVar("tracing", default=False)


#: What tells a section that is recomputed, or runs without gradients, from its surroundings.
Section = tuple[int, bool]


def current_section() -> Section:
    """Identify the checkpointed section, or the segment without gradients, that is running."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (0 if hooks is None else id(hooks[0])), torch.is_grad_enabled()
