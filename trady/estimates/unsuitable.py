"""What a method of training finds nothing for, or needs a package for."""

from __future__ import annotations

import importlib
from typing import Any

from trady.errors import ModelError


class UnsuitableMethodError(ModelError):
    """A method that this network has nothing for; the message says why."""


class MissingPackageError(ModelError):
    """A package of an extra that is not installed."""


def needs(package: str, extra: str) -> Any:
    """Import a package that an extra of trady installs.

    Raises:
        MissingPackageError: It is not installed; the message says what to type.

    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(f'{package} cannot be imported ({error}): pip install "trady[{extra}]"') from None
