"""Writes segments of calls down while a model runs, and computes them when they are complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trady.analysis.fusion import Step
from trady.analysis.segments import Segment
from trady.calls.actions import Action, InPlace, WithLayer
from trady.calls.kind import Keeps
from trady.calls.kinds import LossCall, RecurrentCall, WeightCall
from trady.calls.names import BACKWARD_READS_NOTHING, in_place, name_of
from trady.calls.questions import draws_numbers
from trady.calls.recognize import kind_of, recognize
from trady.interception.program import Entry, Program, Slot
from trady.ops.context import real_type
from trady.ops.operators import Linear
from trady.ops.recompute import Chunk, Recipe, recomputed
from trady.ops.selected import SelectedChannels


class Compute(Protocol):
    """Computes one call as the interception does."""

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], action: Action | None, *, graph_only: bool
    ) -> Any:
        """Compute it; ``graph_only`` where nobody reads its values."""


#: The largest tensor of a chunk takes about as many bytes: small enough for caches, large enough for matrix products.
_CHUNK_BYTES, _CHUNK_BYTES_ELSEWHERE = 4 << 20, 64 << 20


class DeferredSegment:
    """One segment that is being written down.

    Args:
        segment: Where it begins and ends.
        steps: All calls of the plan.
        compute: Computes a call.
        trains: From a weight's identity to its layer's name and leaf, where channels train.
        before: The program of this segment in an earlier forward pass.

    """

    def __init__(
        self,
        segment: Segment,
        steps: tuple[Step, ...],
        compute: Compute,
        trains: Callable[[int], tuple[SelectedChannels, Tensor] | None],
        before: Program | None = None,
    ) -> None:
        self.segment = segment
        self.program = Program(segment.samples, before)
        self._compute, self._trains = compute, trains
        self._actions = [step.action for step in steps[segment.start : segment.last + 1]]
        self._weights: dict[int, WeightCall] = {}
        self._keeping: set[int] = set()
        self._loss: LossCall | None = None

    @property
    def next_call(self) -> int:
        """The call of the plan that must come next."""
        return self.segment.start + len(self.program.entries)

    def write(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take a call down; with the last one compute all, and return its real result."""
        call = recognize(function, args, kwargs)
        if isinstance(call, WeightCall) and isinstance(call.weight, nn.Parameter):
            self._weights[len(self.program.entries)] = call
        if call is not None and kind_of(call).keeps(call) is not Keeps.NOTHING:
            self._keeping.add(len(self.program.entries))
        self._loss = call if isinstance(call, LossCall) else None
        here, last = self.next_call, self.next_call == self.segment.last
        held = [place for call, place in self.segment.outputs if call == here and not last]
        result = self.program.write(function, args, kwargs, held)
        if not last:
            return result
        return self._finish(result)

    def skip_to(self, place: int) -> None:
        """Leave out the calls in front of ``place``: they do not belong to the segment."""
        while self.next_call < place:
            self.program.skip()

    def _finish(self, result: Any) -> Any:
        """Compute all; put what was missing into the last call's result."""
        program, segment = self.program, self.segment
        slots = program.close([(call - segment.start, place) for call, place in segment.outputs])
        held = [program.held.get(slot) for slot in slots]
        places = {id(program.fakes[slot]): place for place, slot in enumerate(slots)}
        identities = {id(call.weight) for call in self._weights.values()}
        trained = {identity: found for identity in identities if (found := self._trains(identity)) is not None}
        in_chunks = not program.full_batch
        averages = self._loss is not None and self._loss.mean and in_chunks
        axes = [program.output_axes.get(slot) if in_chunks else None for slot in slots]
        recipe = Recipe(
            run=self._runner(slots, set(trained), in_chunks),
            input_axes=list(program.input_axes),
            output_axes=[*axes, None] if averages else axes,
            batch=max(program.batch, 1),
            samples_at_once=_samples_at_once(program) if in_chunks else max(program.batch, 1),
            averages=averages,
            leaves=[leaf for _, leaf in trained.values()],
            draws=any(draws_numbers(entry.function, entry.args, entry.kwargs) for entry in program.entries),
            check=_check(trained),
        )
        inputs = program.inputs
        program.let_go()
        self._weights.clear()
        self._loss = None
        real = recomputed(recipe, inputs, held)
        return tree_map(lambda leaf: real[places[id(leaf)]] if id(leaf) in places else leaf, result)

    def _runner(
        self, slots: tuple[int, ...], trained: set[int], in_chunks: bool
    ) -> Callable[[list[Tensor], Chunk, bool], list[Tensor]]:
        program, compute = self.program, self._compute
        actions = [_inside(action, entry) for action, entry in zip(self._actions, program.entries, strict=True)]
        graph_only = _without_values(program, slots, self._weights, self._keeping, trained, actions)
        sums_up = self._loss is not None and in_chunks
        averages = self._loss is not None and self._loss.mean and in_chunks
        alone = sums_up and _scores_are_read_by_the_loss_alone(program, slots, self._weights, actions)

        def run(inputs: list[Tensor], chunk: Chunk, backward: bool) -> list[Tensor]:
            counts: list[Tensor] = []

            def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
                if sums_up and index == len(actions) - 1:
                    loss = recognize(function, args, kwargs)
                    assert isinstance(loss, LossCall)
                    if averages:
                        counts.append(loss.count())
                    return loss.total(overwrite=backward and alone, graph_only=backward)
                return compute(function, args, kwargs, actions[index], graph_only=backward and index in graph_only)

            values = program.run(inputs, chunk.samples, call)
            return [*(values[slot] for slot in slots), *counts]

        return run


def _samples_at_once(program: Program) -> int:
    on_cpu = program.device is None or real_type(program.device) == "cpu"
    largest = max((t.numel() * t.element_size() for t in program.fakes), default=1)
    chunks = -(-largest // (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_ELSEWHERE))
    return -(-program.batch // max(1, min(chunks, program.batch)))


def _inside(action: Action | None, entry: Entry) -> Action | None:
    """What comes from outside of a segment is needed once more: it must not be overwritten."""
    outside = isinstance(action, InPlace) and not entry.reads
    return replace(action, overwrite=False) if outside and isinstance(action, InPlace) else action


def _without_values(
    program: Program,
    slots: tuple[int, ...],
    weights: dict[int, WeightCall],
    keeping: set[int],
    trained: set[int],
    actions: list[Action | None],
) -> set[int]:
    """The linear layers at the end of a segment whose result no backward formula reads: only their graph is needed."""
    needed: set[int] = set()
    found: set[int] = set()
    for index in reversed(range(len(program.entries))):
        entry = program.entries[index]
        call = weights.get(index)
        value_needed = any(slot in needed for slot in entry.outputs)
        linear = call is not None and isinstance(call.operator, Linear) and not _computes_more(actions[index])
        linear = linear and not isinstance(call, RecurrentCall)
        if linear and call is not None and not call.weight.requires_grad:
            if not value_needed:
                found.add(index)
            if id(call.weight) in trained:
                needed.update(entry.reads)
        elif value_needed or index in keeping or name_of(entry.function) not in BACKWARD_READS_NOTHING:
            needed.update(entry.reads)
        elif in_place(entry.function):  # it writes, if not reads
            needed.update(set(entry.reads) & set(entry.outputs))
    return found


def _scores_are_read_by_the_loss_alone(
    program: Program, slots: tuple[int, ...], weights: dict[int, WeightCall], actions: list[Action | None]
) -> bool:
    """Whether the memory of the scores that the last call reads is nobody else's, so that it may be overwritten.

    So it is if a linear layer made them, which does not read its result again, and every tensor from there
    to the loss has one reader, which only shows it in another shape or type, and is not handed on.
    """
    scores = program.entries[-1].args[:1]
    while scores and isinstance(scores[0], Slot):
        slot = scores[0].index
        makers = [i for i, entry in enumerate(program.entries) if slot in entry.outputs]
        readers = [entry for entry in program.entries for read in entry.reads if read == slot]
        if slot in slots or len(makers) != 1 or len(readers) != 1:
            return False
        maker = program.entries[makers[0]]
        if makers[0] in weights:
            linear = isinstance(weights[makers[0]].operator, Linear)
            return linear and len(maker.outputs) == 1 and not _computes_more(actions[makers[0]])
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


def _check(trained: dict[int, tuple[SelectedChannels, Tensor]]) -> Callable[[], None]:
    def check() -> None:
        for selected, _ in trained.values():
            selected.check_current()

    return check
