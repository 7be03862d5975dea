"""Which models are prepared at present."""

from __future__ import annotations

import weakref

from torch import nn

from trady.errors import StateError

#: Every module of a prepared model, with the identities of the model's parameters that were frozen before.
prepared_modules: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def refuse_prepared(model: nn.Module) -> None:
    """Raise :class:`StateError` if a tuner has the model, or a part of it, in its hands."""
    if any(module in prepared_modules for module in model.modules()):
        raise StateError(
            f"this {type(model).__name__} is prepared already: call finish() on its tuner before preparing it again"
        )
