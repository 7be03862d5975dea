"""What a model has seen where it looked at values, to be told again where tensors have none.

A trace runs on the meta device. A model may look at values all the same: an assertion, a check of its arguments, an
index made of a mask, a matching of predictions and labels. Such calls are answered once, in a pass on the real example
(:mod:`trady.trace.observer`), and the answers are repeated in every pass without values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from trady.calls.names import name_of
from trady.model.batch import tensors_among

#: What tells the tensors among the arguments of a call: shapes and types.
Given = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Outline:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Outline:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def make(self) -> Tensor:
        """Make such a tensor, without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class Answer:
    """One call that cannot be done without values, and what it gave.

    Attributes:
        function: The torch function.
        given: The tensors among its arguments.
        result: What it returned, with outlines in place of tensors.
    """

    function: Any
    given: Given
    result: Any

    @classmethod
    def of(cls, function: Any, arguments: Iterable[Any], result: Any) -> Answer:
        """Note an answer."""
        outlined = tree_map(lambda leaf: Outline.of(leaf) if isinstance(leaf, Tensor) else leaf, result)
        return cls(function, given_to(arguments), outlined)

    @property
    def decides(self) -> bool:
        """Whether the model has got a value to decide by, no tensor."""
        return not any(isinstance(leaf, Outline) for leaf in tree_iter(self.result))

    def repeated(self, arguments: Iterable[Any]) -> Any:
        """Give the answer again; tensors of it have a graph where those that are given have one."""
        outlines = [leaf for leaf in tree_iter(self.result) if isinstance(leaf, Outline)]
        if not outlines:
            return copy.deepcopy(self.result)
        sources = [tensor for tensor in tensors_among(arguments) if tensor.requires_grad]
        if sources and torch.is_grad_enabled():
            made = iter(_StandIn.apply(outlines, *sources))
        else:
            made = iter([outline.make() for outline in outlines])
        return tree_map(lambda leaf: next(made) if isinstance(leaf, Outline) else leaf, self.result)


class Answers(Protocol):
    """Answers the calls of one pass that need values."""

    @property
    def all(self) -> tuple[Answer, ...]:
        """All answers of the pass."""

    def to(self, function: Any, arguments: Sequence[Any], origin: Callable[[], list[str]]) -> Answer | None:
        """Answer a call of the pass, on fake tensors; ``None`` if it needs no values.

        Args:
            function: The torch function.
            arguments: Its arguments.
            origin: Names of the functions that have made what it reads, the last one first.

        """


class Replay:
    """Repeats answers in one pass, in order.

    Args:
        answers: Of the observed pass.
        any_size: Whether the pass is on a batch of another size.

    """

    def __init__(self, answers: tuple[Answer, ...], *, any_size: bool = False) -> None:
        self.all, self._next, self._any_size = answers, 0, any_size

    def to(self, function: Any, arguments: Sequence[Any], origin: Callable[[], list[str]] = list) -> Answer | None:
        """Return the next answer if it is to this call."""
        if self._next == len(self.all):
            return None
        answer = self.all[self._next]
        if answer.function != function or not (self._any_size or answer.given == given_to(arguments)):
            return None
        self._next += 1
        return answer

    def earlier(self, function: Any, arguments: Sequence[Any]) -> Answer | None:
        """Return the last answer to a call like this: a checkpoint runs its section again."""
        given = given_to(arguments)
        like = (a for a in reversed(self.all[: self._next]) if a.function == function and a.given == given)
        return next(like, None)


class Assumed:
    """Answers checks of a model whose weights or example have no values, as if all was in order."""

    def __init__(self) -> None:
        self._given: list[Answer] = []

    @property
    def all(self) -> tuple[Answer, ...]:
        """What was answered."""
        return tuple(self._given)

    def to(self, function: Any, arguments: Sequence[Any], origin: Callable[[], list[str]]) -> Answer | None:
        """Answer whether something holds of all elements, or of any."""
        if name_of(function) not in ("bool", "item"):
            return None
        made, holds = origin(), True
        while made and made[0] in ("logical_not", "not", "invert", "to", "bool"):
            holds = holds != (made.pop(0) in ("logical_not", "not", "invert"))
        if not made or made[0] not in _IN_ORDER:
            return None
        answer = Answer.of(function, arguments, holds == _IN_ORDER[made[0]])
        self._given.append(answer)
        return answer


#: What functions give where nothing is wrong.
_IN_ORDER = {"all": True, "_is_all_true": True, "isfinite": True, "any": False, "_is_any_true": False, "isnan": False,
             "isinf": False}  # fmt: skip


def given_to(arguments: Iterable[Any]) -> Given:
    """Shapes and types of the tensors among arguments."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_among(arguments))


class _StandIn(torch.autograd.Function):
    """A computation that fake tensors cannot do; its backward pass keeps all it may need."""

    @staticmethod
    def forward(ctx: Any, outlines: list[Outline], *sources: Tensor) -> tuple[Tensor, ...]:
        made = tuple(outline.make() for outline in outlines)
        ctx.save_for_backward(*sources, *(t for t in made if t.is_floating_point()))
        ctx.count = len(sources)
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty_like(source) for source in ctx.saved_tensors[: ctx.count])
