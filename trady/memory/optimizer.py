"""What an optimizer takes beside weights and gradients: what it keeps, and what a step needs for a moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise


@dataclass(frozen=True)
class OptimizerMemory:
    """Tensors of an optimizer, counted in copies of the parameters that it updates.

    A step that goes from parameter to parameter (``foreach=False``, the default on a CPU) makes its temporaries for one
    parameter, while those of the parameter before may still be held; one over all parameters at once (``foreach=True``,
    the default on CUDA) makes them for all. Fused steps make none. :func:`trady.optimizer_state.optimizer_memory`
    measures the numbers.

    Attributes:
        copies: Copies of every parameter that are kept: 0 for SGD, 1 with momentum, 2 for Adam.
        every: Copies of every parameter that a step needs for a moment.
        current: Copies of the parameter under way that it needs beside them.
        previous: Copies of the parameter before that are still there meanwhile.
        in_backward: Copies of a gradient that are needed to use it up when it arrives (:mod:`trady.optim`); ``None``
            where compact gradients wait for the step.
    """

    copies: int = 0
    every: float = 0.0
    current: float = 0.0
    previous: float = 0.0
    in_backward: int | None = None

    def moment_bytes(self, sizes: Sequence[int]) -> int:
        """What a step needs for a moment.

        Args:
            sizes: Bytes of the parameters that have a gradient, in the order in which they are updated.

        """
        neighbours = pairwise((0, *filter(None, sizes)))
        most = max((self.previous * before + self.current * size for before, size in neighbours), default=0.0)
        return math.ceil(self.every * sum(sizes) + most)

    def most_moment_bytes(self, sizes: Sequence[int]) -> int:
        """Bound :meth:`moment_bytes` over all orders of the parameters."""
        second, first = sorted((0, 0, *sizes))[-2:]
        most = max(self.previous * second + self.current * first, self.previous * first + self.current * second)
        return math.ceil(self.every * sum(sizes) + most)

    def __or__(self, other: OptimizerMemory) -> OptimizerMemory:
        """Enough for both, each of which steps by itself; ``in_backward`` is that of the other."""
        most = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)[:-1]}
        return OptimizerMemory(**most, in_backward=other.in_backward)
