"""The parameters of a prepared model: its own, and those that train in the place of quantised ones.

A weight in floating point shows its channels itself (:mod:`trady.interception.shown_weights`); one that is stored
quantised can have no gradient. PyTorch's idioms ask a module for its parameters: ``zero_grad()``,
``clip_grad_norm_(model.parameters(), …)``, an optimizer over those that require a gradient. So every module that holds
such a layer shows the channels behind its own parameters in ``parameters()``, until the tuner has finished. Names
(``named_parameters()``, ``state_dict()``), modules and their classes stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType

from torch import nn


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a module has without any tuner."""
    return (parameter for _, parameter in module.named_parameters())


def _shown(module: nn.Module, extra: Sequence[nn.Parameter]) -> MethodType:
    """Return a ``parameters`` of the module that shows others behind its own; of a copy, its own alone."""
    original = weakref.ref(module)

    def parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from type(self).parameters(self, recurse)
        if recurse and self is original():  # last, so that whoever walks two models meets the same parameters first
            yield from extra

    return MethodType(parameters, module)


class ShownParameters:
    """Shows parameters behind those of the modules that hold what they stand for, until :meth:`remove`.

    Args:
        model: The model.
        extra: Full names, as they would be in the model, to parameters.
        wrappers: Modules around the model, such as one that ``torch.compile`` has made.
    """

    def __init__(
        self, model: nn.Module, extra: Mapping[str, nn.Parameter], wrappers: tuple[nn.Module, ...] = ()
    ) -> None:
        self._modules: list[nn.Module] = []
        for path, module in model.named_modules():
            start = f"{path}." if path else ""
            inside = [parameter for name, parameter in extra.items() if name.startswith(start)]
            if inside:
                self._show(module, inside)
        for wrapper in wrappers:
            self._show(wrapper, list(extra.values()))

    def _show(self, module: nn.Module, extra: Sequence[nn.Parameter]) -> None:
        if "parameters" in module.__dict__:  # somebody's own: let it be
            return
        module.__dict__["parameters"] = _shown(module, extra)
        self._modules.append(module)

    def remove(self) -> None:
        """Let the modules show their own parameters alone."""
        for module in self._modules:
            module.__dict__.pop("parameters", None)
        self._modules = []
