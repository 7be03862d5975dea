"""How a segment's program is computed: each call as the plan wants it, without values where only a graph is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from trady.calls.actions import Action, InPlace, WithLayer
from trady.calls.kind import Bound
from trady.calls.kinds import LossCall
from trady.calls.names import BACKWARD_READS_NOTHING, in_place, name_of
from trady.calls.recognize import recognize
from trady.interception.flat_program import FlatProgram
from trady.interception.handlers import Handlers
from trady.interception.places import bound_call
from trady.interception.program import Program
from trady.interception.written import Entry, Slot
from trady.ops.recompute import Chunk


class Runner:
    """Computes a program, forward and backward.

    Args:
        program: The program, complete.
        trained: Identities of the weights of which channels train.
        actions: How the plan wants its calls computed.
        in_chunks: Whether it may be computed on a chunk of the batch.
        handlers: Compute the calls of the model.
        commit: Called when a value was put off or overwritten.
    """

    def __init__(
        self,
        program: Program,
        trained: frozenset[int],
        actions: Sequence[Action | None],
        in_chunks: bool,
        handlers: Handlers,
        commit: Callable[[], None],
    ) -> None:
        self._handlers, self._commit = handlers, commit
        self._actions = [_inside(action, entry) for action, entry in zip(actions, program.entries, strict=True)]
        self._graph_only = _without_values(program, trained, self._actions)
        self._sums_up = program.loss[0] and in_chunks
        self._averages = program.loss[1] and in_chunks
        self._alone = self._sums_up and _scores_are_read_by_the_loss_alone(program, self._actions)
        inputs = len(program.input_axes)
        forward, backward = (FlatProgram(program.entries, inputs, program.wanted) for _ in range(2))
        self._flat = {False: forward, True: backward}
        self._counts: list[Tensor] = []

    def __call__(self, inputs: list[Tensor], chunk: Chunk, backward: bool) -> list[Tensor]:
        """Compute a chunk; see :class:`trady.ops.recompute.Recipe`."""
        compute, bind = partial(self._call, backward), partial(self._bind, backward)
        values = self._flat[backward].run(inputs, chunk.samples, compute, bind)
        counts, self._counts = self._counts, []
        return [*values, *counts]

    def _call(self, backward: bool, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
        graph_only = backward and index in self._graph_only
        action = self._actions[index]
        return self._handlers.compute(function, args, kwargs, action, graph_only=graph_only, commit=self._commit)

    def _bind(
        self, backward: bool, index: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Bound | None:
        if self._sums_up and index == len(self._actions) - 1:
            return partial(self._loss, backward, function)
        graph_only = backward and index in self._graph_only
        action = self._actions[index]
        return bound_call(function, args, kwargs, action, self._handlers, self._commit, graph_only=graph_only)

    def _loss(self, backward: bool, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        loss = recognize(function, args, kwargs)
        assert isinstance(loss, LossCall)
        if self._averages:
            self._counts.append(loss.count())
        return loss.total(overwrite=backward and self._alone, graph_only=backward)


def _inside(action: Action | None, entry: Entry) -> Action | None:
    """What comes from outside of a segment is needed once more: it must not be overwritten."""
    outside = isinstance(action, InPlace) and not entry.reads
    return replace(action, overwrite=False) if outside and isinstance(action, InPlace) else action


def _without_values(program: Program, trained: frozenset[int], actions: list[Action | None]) -> set[int]:
    """The linear layers at the end of a segment whose result no backward formula reads: only their graph is needed."""
    needed: set[int] = set()
    found: set[int] = set()
    for index in reversed(range(len(program.entries))):
        entry = program.entries[index]
        layer = program.weights.get(index)
        value_needed = any(slot in needed for slot in entry.outputs)
        linear = layer is not None and layer.linear and not _computes_more(actions[index])
        if linear and layer is not None and not layer.weight.requires_grad:
            if not value_needed:
                found.add(index)
            if id(layer.weight) in trained:
                needed.update(entry.reads)
        elif value_needed or index in program.keeping or name_of(entry.function) not in BACKWARD_READS_NOTHING:
            needed.update(entry.reads)
        elif in_place(entry.function):  # it writes, if not reads
            needed.update(set(entry.reads) & set(entry.outputs))
    return found


def _scores_are_read_by_the_loss_alone(program: Program, actions: list[Action | None]) -> bool:
    """Whether the memory of the scores that the last call reads is nobody else's, so that it may be overwritten.

    So it is if a linear layer made them, which does not read its result again, and every tensor from there
    to the loss has one reader, which only shows it in another shape or type, and is not handed on.
    """
    scores = program.entries[-1].args[:1]
    while scores and isinstance(scores[0], Slot):
        slot = scores[0].index
        makers = [i for i, entry in enumerate(program.entries) if slot in entry.outputs]
        readers = [entry for entry in program.entries for read in entry.reads if read == slot]
        if slot in program.wanted or len(makers) != 1 or len(readers) != 1:
            return False
        maker = program.entries[makers[0]]
        if makers[0] in program.weights:
            return (
                program.weights[makers[0]].linear and len(maker.outputs) == 1 and not _computes_more(actions[makers[0]])
            )
        if name_of(maker.function) not in _SHOWS_THE_SAME or len(maker.outputs) != 1 or len(maker.reads) != 1:
            return False
        scores = tuple(Slot(read) for read in maker.reads)
    return False


#: Functions that return their argument in another shape or type, and whose backward reads neither.
_SHOWS_THE_SAME_NAMES = """
    view reshape flatten unflatten squeeze unsqueeze contiguous getitem float to type half bfloat16 double
"""

_SHOWS_THE_SAME = frozenset(_SHOWS_THE_SAME_NAMES.split())


def _computes_more(action: Action | None) -> bool:
    return action is not None and not (isinstance(action, WithLayer) and action.clamp is None and action.norm is None)
