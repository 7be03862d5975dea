"""One forward pass on the meta device: which layers a model calls, with what shapes, in what order.

Nothing is computed and nothing is allocated: every tensor a call receives is replaced by one of the
same shape on the meta device. The model itself is only read.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trady.calls.kind import Call
from trady.model.hooks import KnownHooks
from trady.trace.answers import Answer
from trady.trace.draws import Draws


@dataclass
class Value:
    """A tensor at one point of the trace; writing into it makes a new value.

    Attributes:
        producer: Index of the call that made it.
        readers: Calls that read its elements, in order.
        shape_readers: Calls that read its shape or kind.
        reference: The tensor, as long as somebody holds it.
        replaced: Whether a later call wrote into the same tensor.
        view: Whether it shares memory with another tensor.
        same_as: The value whose very tensor a call handed back, maybe with other content; ``None`` for a new one.
        ended: The call before which the tensor was freed or got other content, less a half if that was before numbers
            were drawn for a decision in front of that call; ``None`` if it was still there in the end.
    """

    producer: int
    reference: weakref.ref[Tensor]
    shape: tuple[int, ...]
    readers: list[int] = field(default_factory=list)
    shape_readers: list[int] = field(default_factory=list)
    replaced: bool = False
    view: bool = False
    same_as: int | None = None
    ended: float | None = None

    @property
    def kept(self) -> bool:
        """Whether somebody still held the tensor, with this content, when the forward had ended."""
        return not self.replaced and self.reference() is not None


@dataclass
class TracedCall:
    """One call of a torch function.

    Attributes:
        function: The torch function.
        call: What it means, without its input tensor; ``None`` if it is not recognised.
        reads: Values whose elements it reads, in order of its arguments.
        makes: Values it returns.
        parameters: Parameters and buffers among its arguments.
        container: The innermost module with children that was running.
        module: The innermost module that was running.
        scope: The module whose call is recomputed as a whole if this call is: the model itself, or inside
            a checkpointed section the outermost module called there. ``None`` for calls that no module
            of ours surrounds when they are recomputed, or that run inside a custom autograd function or
            under ``torch.no_grad()``.
        numbers: Whole numbers among its arguments, in order: sizes, dimensions, indices.
        shapes: Shapes of the tensors among its arguments, in order.
        written: The values that it overwrites; ``None`` for a tensor that no call made (an input, a buffer).
        keywords: The whole numbers among each of its keyword arguments.
        auxiliary: Whether it reads nothing but ids, masks and what is made of them, none of the model's own tensors.
        looks: Whether it needs the values of activations: no fake tensor can do it.
        in_function: Whether it runs inside of a custom autograd function, which may have a gradient of its own.
        without_gradient: Whether gradients are switched off where it runs.
    """

    function: Any
    call: Call | None
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    parameters: tuple[Tensor, ...]
    container: str
    module: str
    scope: str | None = ""
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    written: tuple[int | None, ...] = ()
    keywords: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    auxiliary: bool = False
    looks: bool = False
    in_function: bool = False
    without_gradient: bool = False


@dataclass
class Trace:
    """A forward pass as a list of calls and the values between them.

    Attributes:
        calls: Calls that touch elements of tensors, in order.
        values: The tensors between them.
        spans: For every module call: module name, first call, one past the last call.
        batch: Samples in the example.
        way: How the model was called (:func:`trady.model.batch.way_of_calling`).
        hooks: The model's forward hooks when the pass had ended: some models hang them in when they first need them.
        draws: What random numbers were.
        answers: To the calls that look at values.
        rounds: Passes of the model in front of this one, with what it kept in Python from one to the next.
        keeps_state: Whether it kept something there.
        words: 32-bit words that a random generator has given, where the model has decided by them; else 0.
        host_words: Those of Python's and NumPy's generators, whatever they were for.
        decisions: The calls in front of which the model has learnt something that it may decide by: a value, or a
            random number. Another pass may go another way from there.
    """

    calls: list[TracedCall] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    batch: int = 1
    way: tuple[Any, ...] = ()
    hooks: KnownHooks = frozenset()
    draws: Draws = field(default_factory=Draws)
    answers: tuple[Answer, ...] = ()
    rounds: int = 0
    keeps_state: bool = False
    words: int = 0
    host_words: int = 0
    decisions: tuple[int, ...] = ()

    def crosses_decision(self, value: int) -> bool:
        """Whether a value is there when the model decides: what reads it then is not known."""
        return self.decided_after(value, self.values[value].producer + 1)

    def decided_after(self, value: int, position: int) -> bool:
        """Whether the model decides at or behind a position while a value is still there."""
        place = bisect_left(self.decisions, position)
        ended = self.values[value].ended
        return place < len(self.decisions) and (ended is None or self.decisions[place] <= ended)
