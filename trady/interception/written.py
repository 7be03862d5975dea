"""What a call looks like when it is written down: its function, and what stands for its tensors and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trady.ops.sample_axis import SampleAxis


@dataclass(frozen=True)
class WrittenWeight:
    """A weight layer of a program, without its input, which would outlive the pass.

    Attributes:
        weight: Its weight.
        linear: Whether it is a linear layer, and no recurrent one.
    """

    weight: nn.Parameter
    linear: bool


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor that an earlier call of the program makes."""

    index: int


@dataclass(frozen=True)
class Input:
    """Stands for a tensor from outside of the program, where its samples lie along ``axis``."""

    index: int
    axis: SampleAxis | None


@dataclass(frozen=True)
class Sizes:
    """Stands for a whole number that grows with the batch."""

    per_sample: int


@dataclass
class Entry:
    """One call: tensors and sizes among its arguments are replaced by :class:`Slot`, :class:`Input`, :class:`Sizes`.

    Attributes:
        function: The torch function; ``None`` for a call that does not belong to the program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: Slots of what it returns.
        reads: Slots that it reads.
        gone: Slots that nobody reads after it.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    reads: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
