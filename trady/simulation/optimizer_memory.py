"""What an optimizer takes beside weights and gradients: what it keeps, and what a step needs for a moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

from trady.process.ranks import buffer_bytes

#: Whether a gradient is there, in the widest type.
_FLAG_BYTES = 8


@dataclass(frozen=True)
class Form:
    """Bytes of a parameter and of its means, which optimizers that factor the second moment keep in its place.

    Attributes:
        whole: Of the parameter.
        rows: Of a mean over the last dimension; of a vector, which is not factored, all of it.
        columns: Of a mean over the last dimension but one; of a vector, nothing.
        both: Of a mean over both; of a vector, nothing.
    """

    whole: int
    rows: int = 0
    columns: int = 0
    both: int = 0

    @classmethod
    def of(cls, shape: Sequence[int], element_bytes: int) -> Form:
        """Measure a parameter of this shape."""
        whole = math.prod(shape) * element_bytes
        if not whole or len(shape) < 2:
            return cls(whole, whole)
        return cls(whole, whole // shape[-1], whole // shape[-2], whole // (shape[-1] * shape[-2]))


@dataclass(frozen=True)
class Amount:
    """Copies of a parameter and of its means (:class:`Form`)."""

    copies: float = 0.0
    rows: float = 0.0
    columns: float = 0.0
    both: float = 0.0

    def of(self, form: Form) -> float:
        """In bytes."""
        means = self.rows * form.rows + self.columns * form.columns + self.both * form.both
        return self.copies * form.whole + means

    def __or__(self, other: Amount) -> Amount:
        """Enough for both."""
        return Amount(*map(max, astuple(self), astuple(other)))


#: What is kept, and what a step needs of every parameter, of the current one and of the one before.
Amounts = tuple[Amount, Amount, Amount, Amount]


@dataclass(frozen=True)
class OptimizerMemory:
    """Tensors of an optimizer, counted in copies of the parameters that it updates.

    A step that goes from parameter to parameter (``foreach=False``, the default on a CPU) makes its temporaries for one
    parameter, while those of the parameter before may still be held; one over all parameters at once (``foreach=True``,
    the default on CUDA) makes them for all. Fused steps make none.
    :func:`trady.simulation.optimizer_probe.optimizer_memory` measures the numbers.

    Attributes:
        copies: Copies of every parameter that are kept at most: 0 for SGD, 1 with momentum, 2 for Adam.
        every: Copies of every parameter that a step needs for a moment, at most.
        current: Copies of the parameter under way that it needs beside them, at most.
        previous: Copies of the parameter before that are still there meanwhile, at most.
        in_backward: Copies of a gradient that are needed to use it up when it arrives (:mod:`trady.optim`); ``None``
            where compact gradients wait for the step.
        factored: The same four where they depend on the parameter's shape (Adafactor keeps two means of a matrix, all
            of a vector, and as much as two copies of a pointwise convolution); ``None`` where they do not.
        averages: Whether gradients are averaged over processes before the step, in buffers.
    """

    copies: int = 0
    every: float = 0.0
    current: float = 0.0
    previous: float = 0.0
    in_backward: int | None = None
    factored: Amounts | None = None
    averages: bool = False

    @property
    def amounts(self) -> Amounts:
        """What is kept, of every parameter, of the current one and of the one before."""
        if self.factored is not None:
            return self.factored
        return Amount(self.copies), Amount(self.every), Amount(self.current), Amount(self.previous)

    def kept_bytes(self, forms: Iterable[Form]) -> int:
        """What is kept of these parameters."""
        kept = self.amounts[0]
        return sum(math.ceil(kept.of(form)) for form in forms)

    def moment_bytes(self, forms: Iterable[Form]) -> int:
        """What a step needs for a moment.

        Args:
            forms: The parameters that have a gradient, in the order in which they are updated.

        """
        _, every, current, previous = self.amounts
        there = [form for form in forms if form.whole]
        neighbours = pairwise((Form(0), *there))
        most = max((previous.of(before) + current.of(form) for before, form in neighbours), default=0.0)
        return max(math.ceil(sum(every.of(form) for form in there) + most), self._buffers(there))

    def most_moment_bytes(self, forms: Iterable[Form]) -> int:
        """Bound :meth:`moment_bytes` over all orders of the parameters."""
        _, every, current, previous = self.amounts
        there = [Form(0), Form(0), *forms]
        before, now = ([amount.of(form) for form in there] for amount in (previous, current))
        last = sorted(range(len(there)), key=before.__getitem__)[-2:]
        most = max(now[i] + max(before[j] for j in last if j != i) for i in range(len(there)))
        return max(math.ceil(sum(every.of(form) for form in there) + most), self._buffers(there))

    def _buffers(self, forms: Sequence[Form]) -> int:
        """What averaging over processes takes for a moment: gradients, and for each whether there is one."""
        sizes = [form.whole for form in forms if form.whole] if self.averages else []
        return buffer_bytes([*sizes, _FLAG_BYTES * len(sizes)])

    def __or__(self, other: OptimizerMemory) -> OptimizerMemory:
        """Enough for both, each of which steps by itself; ``in_backward`` is that of the other."""
        factored: Amounts | None = None
        if self.factored is not None or other.factored is not None:
            kept, every, current, previous = (a | b for a, b in zip(self.amounts, other.amounts, strict=True))
            factored = kept, every, current, previous
        return OptimizerMemory(
            max(self.copies, other.copies),
            max(self.every, other.every),
            max(self.current, other.current),
            max(self.previous, other.previous),
            other.in_backward,
            factored,
            self.averages or other.averages,
        )

    def state(self) -> dict[str, Any]:
        """What is kept, as JSON values for a checkpoint; :meth:`with_state` reads it."""
        factors = self.factored and [list(astuple(amount)) for amount in self.factored]
        return {"state_copies": self.copies, "state_factors": factors}

    def with_state(self, state: Any) -> OptimizerMemory:
        """Take over what :meth:`state` gave.

        Raises:
            KeyError, TypeError, ValueError: It is something else.

        """
        factors = state.get("state_factors")
        factored: Amounts | None = None
        if factors is not None:
            kept, every, current, previous = (Amount(*map(float, amount)) for amount in factors)
            factored = kept, every, current, previous
        copies = int(state["state_copies"])
        return OptimizerMemory(
            copies, self.every, self.current, self.previous, self.in_backward, factored, self.averages
        )
