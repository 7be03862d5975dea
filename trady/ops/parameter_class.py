"""What is a parameter of PyTorch's own class: tuners give parameters classes above it for a while."""

from __future__ import annotations

from torch import nn

#: Classes that tuners have made above ``nn.Parameter``; operations treat theirs as they treat that one's.
shown_classes: set[type] = set()


def is_parameter_class(kind: type) -> bool:
    """Whether this is ``nn.Parameter``, or a class that a tuner has put above it."""
    return kind is nn.Parameter or kind in shown_classes


def note_class(kind: type, above: type) -> None:
    """Remember a class that was made above another one."""
    if above is nn.Parameter:
        shown_classes.add(kind)
