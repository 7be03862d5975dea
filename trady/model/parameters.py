"""The parameters of a module."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a module has, also where its class has a ``parameters()`` of its own."""
    return (parameter for _, parameter in module.named_parameters())
