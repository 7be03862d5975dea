"""Models of the user's own: ``package.module:function``, called with the number of classes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from trady.errors import ModelError
from trady.training.data.datasets import Normalization
from trady.training.models.here import importable_here
from trady.training.models.source import LoadedModel, ModelSource


def _matches(name: str) -> bool:
    return ":" in name


def find_function(name: str) -> Callable[..., object]:
    """Import ``package.module:function``, from the current folder too.

    Raises:
        ModelError: There is no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        with importable_here():
            function: Callable[..., object] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise ModelError(f"no function {function_name!r} in module {module_name!r}: {error}") from error
    return function


def _load(name: str, num_classes: int) -> LoadedModel:
    function = find_function(name)
    with importable_here():  # a function may import more when it is called
        made = function(num_classes)
    if isinstance(made, LoadedModel):
        return made
    if isinstance(made, nn.Module):
        return LoadedModel(made)
    raise ModelError(f"{name}({num_classes}) returned a {type(made).__name__}; expected a torch module")


def _image_format(name: str) -> tuple[Normalization, int]:
    loaded = _load(name, 1)
    return loaded.normalization, loaded.image_size


FUNCTION = ModelSource("package.module:function", _matches, _load, _image_format, find_function)
