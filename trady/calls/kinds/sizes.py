"""What torch functions of one, two and three dimensions share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def by_dimension(reader: Callable[..., Any], *functions: Any) -> dict[Any, Callable[..., Any]]:
    """Return the readers of functions of one, two, … dimensions: ``reader`` with that number in front."""
    return {function: partial(reader, dimensions) for dimensions, function in enumerate(functions, 1)}


def each(value: Any, dimensions: int) -> tuple[int, ...]:
    """Return one whole number a dimension."""
    values = tuple(int(v) for v in value) if isinstance(value, (tuple, list, torch.Size)) else (int(value),)
    return values * dimensions if len(values) == 1 else values
