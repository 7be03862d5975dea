"""What the plan of a forward pass can say of a call: how it is computed with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from trady.ops.bits import Clamp
from trady.ops.frozen_norm import FrozenNorm


@dataclass(frozen=True)
class Done:
    """This call was computed with an earlier one: hand its input on."""


@dataclass(frozen=True)
class WithLayer:
    """A weight layer computed with its neighbours.

    Attributes:
        pad: Zero padding in front of it that was put off until here.
        norm: The frozen normalisation behind it.
        clamp: The activation behind that.
        operation: The names of what is computed together.
    """

    pad: tuple[int, ...] = ()
    norm: FrozenNorm | None = None
    clamp: Clamp | None = None
    operation: str = ""


@dataclass(frozen=True)
class InPlace:
    """A call that may overwrite its first input; ``clamp`` comes with a normalisation."""

    overwrite: bool
    clamp: Clamp | None = None


@dataclass(frozen=True)
class Leave:
    """Leave this call to PyTorch: it is recomputed where nothing is intercepted, or inside a custom function."""


Action = Done | WithLayer | InPlace | Leave
