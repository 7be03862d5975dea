"""Sizes that a torch function takes once for all dimensions or one by one."""

from __future__ import annotations

from typing import Any

import torch


def each(value: Any, dimensions: int) -> tuple[int, ...]:
    """Return one whole number a dimension."""
    values = tuple(int(v) for v in value) if isinstance(value, (tuple, list, torch.Size)) else (int(value),)
    return values * dimensions if len(values) == 1 else values
