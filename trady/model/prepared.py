"""Which models are prepared at present."""

from __future__ import annotations

import weakref

from torch import nn

from trady.errors import StateError

#: Every module of a prepared model, with the identities of the model's parameters that were frozen before.
prepared_modules: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def has_weights(module: nn.Module) -> bool:
    """Whether there is a parameter in a module."""
    return next(module.parameters(), None) is not None


def plain_class(kind: type[nn.Parameter]) -> type[nn.Parameter]:
    """The class that a parameter had before a tuner gave it one, made of what it adds and, last, of this class."""
    found: type[nn.Parameter] = kind.__bases__[-1]
    return found


def refuse_prepared(model: nn.Module) -> None:
    """Raise :class:`StateError` if a tuner has the model, or a part of it with weights, in its hands.

    Libraries share modules without weights, such as activations, between models.
    """
    found = [name for name, module in model.named_modules() if module in prepared_modules and has_weights(module)]
    if not found:
        return
    kind = type(model).__name__
    if found[0]:
        raise StateError(
            f"{found[0]} of this {kind} is prepared already: call finish() on its tuner, and prepare the whole {kind}"
        )
    raise StateError(f"this {kind} is prepared already: call finish() on its tuner before preparing it again")
