"""Training and evaluation mode, whether a trace is running, and in which section of a model."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class ByMode(Generic[T]):
    """What holds of a model in training mode, and what in evaluation mode.

    Attributes:
        training: In training mode.
        evaluation: In evaluation mode; ``None`` if it is not known.
    """

    training: T
    evaluation: T | None = None

    def of(self, training: bool) -> T | None:
        """Return what holds for a flag ``module.training``."""
        return self.training if training else self.evaluation

    def map(self, change: Callable[[T], U]) -> ByMode[U]:
        """Apply a function to both."""
        return ByMode(change(self.training), None if self.evaluation is None else change(self.evaluation))


#: Whether a trace is running: a model that trains already is traced as its author wrote it.
tracing: ContextVar[bool] = ContextVar("tracing", default=False)


#: What tells a section that is recomputed, or runs without gradients, from its surroundings.
Section = tuple[int, bool]


def current_section() -> Section:
    """Identify the checkpointed section, or the segment without gradients, that is running."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (0 if hooks is None else id(hooks[0])), torch.is_grad_enabled()
