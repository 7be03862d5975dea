"""What a person keeps from training: flags, and the words ``train=`` and ``freeze=``."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from trady.errors import ModelError
from trady.model.prepared import prepared_modules
from trady.ops.quantized import is_quantized

#: One or several names or patterns of modules or parameters, or the modules themselves.
Wish = str | nn.Module | Sequence[str | nn.Module]


def frozen_by_hand(model: nn.Module, train: Wish | None = None, freeze: Wish | None = None) -> frozenset[int]:
    """Find the parameters that are to stay as they are.

    Args:
        model: The model.
        train: Only these train, whatever their flags say; ``None`` is all whose ``requires_grad`` is true. Weights that
            are stored quantised cannot have that flag and count as if they had it.
        freeze: These do not.

    Returns:
        Identities of the parameters.

    Raises:
        ModelError: A name or pattern matches no parameter.

    """
    parameters = dict(model.named_parameters())
    before = prepared_modules.get(model, frozenset())
    frozen = {
        id(p)
        for p in parameters.values()
        if id(p) in before or (model not in prepared_modules and not p.requires_grad and not is_quantized(p))
    }
    if train is not None:
        wanted = _matched(model, train, "train")
        frozen = {id(p) for name, p in parameters.items() if name not in wanted}
    if freeze is not None:
        unwanted = _matched(model, freeze, "freeze")
        frozen |= {id(p) for name, p in parameters.items() if name in unwanted}
    return frozenset(frozen)


def as_text(wish: Wish | None) -> str | None:
    """Say what was wished, for settings that have to be the same on resume."""
    if wish is None:
        return None
    given = [wish] if isinstance(wish, (str, nn.Module)) else wish
    return ", ".join(one if isinstance(one, str) else type(one).__name__ for one in given)


def _matched(model: nn.Module, wish: Wish, word: str) -> set[str]:
    """Return the names of the parameters that are meant."""
    names = [name for name, _ in model.named_parameters()]
    places = {id(module): name for name, module in model.named_modules()}
    found: set[str] = set()
    for given in [wish] if isinstance(wish, (str, nn.Module)) else wish:
        pattern = places.get(id(given)) if isinstance(given, nn.Module) else given
        matched = [] if pattern is None else [name for name in names if _matches(name, pattern)]
        if not matched:
            shown = given if isinstance(given, str) else type(given).__name__
            inner = [name for name, module in model.named_modules() if name and list(module.parameters(False))]
            raise ModelError(
                f"{word}={shown!r} matches no parameter of this {type(model).__name__}; its modules are "
                f"{', '.join(inner[:6])}{', …' * (len(inner) > 6)}"
            )
        found.update(matched)
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, or a module that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: length + 1]), pattern) for length in range(len(parts))) or pattern == ""
