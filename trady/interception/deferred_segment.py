"""Writes segments of calls down while a model runs, and computes them when they are complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.analysis.fusion import Step
from trady.analysis.segments import Segment
from trady.calls.canonical import canonical
from trady.calls.kind import Keeps
from trady.calls.kinds import LossCall, RecurrentCall, WeightCall
from trady.calls.questions import draws_numbers
from trady.calls.recognize import kind_of, recognize
from trady.errors import ModelError
from trady.interception.handlers import Handlers
from trady.interception.program import Program
from trady.interception.repeated import RepeatedProgram
from trady.interception.runner import Runner
from trady.interception.written import WrittenWeight
from trady.model.batch import tensors_among
from trady.ops.context import autocast_dtype_on, real_type
from trady.ops.operators import Linear
from trady.ops.recompute import Chunk, Recipe, recomputed
from trady.ops.selected import SelectedChannels

#: Computes a chunk of a segment, forward or backward.
Run = Callable[[list[Tensor], Chunk, bool], list[Tensor]]

#: The largest tensor of a chunk takes about as many bytes: small enough for caches, large enough for matrix products.
_CHUNK_BYTES, _CHUNK_BYTES_ELSEWHERE = 4 << 20, 64 << 20


class DeferredSegment:
    """One segment that is being written down.

    Args:
        segment: Where it begins and ends.
        steps: All calls of the plan.
        handlers: Compute the calls of the model.
        commit: Called when a value was put off or overwritten.
        before: The program of this segment in an earlier forward pass.

    Attributes:
        last: The call of the plan that it ends with.
    """

    def __init__(
        self,
        segment: Segment,
        steps: tuple[Step, ...],
        handlers: Handlers,
        commit: Callable[[], None],
        before: Program | None = None,
    ) -> None:
        self.segment = segment
        self.program = Program(segment.samples, before)
        self._again = None if before is None else RepeatedProgram(before)
        self._handlers, self._commit = handlers, commit
        self.last = segment.last
        self._steps = steps
        self._held: dict[int, list[int]] = {}
        for call, place in segment.outputs:
            if call != self.last:
                self._held.setdefault(call - segment.start, []).append(place)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for something that the segment makes."""
        return (self._again or self.program).knows(tensor)

    @property
    def device(self) -> torch.device | None:
        """Where it is computed."""
        return self.program.device if self._again is None else self._again.before.device

    @property
    def _written(self) -> int:
        return len(self.program.entries if self._again is None else self._again.came)

    @property
    def next_call(self) -> int:
        """The call of the plan that must come next."""
        return self.segment.start + self._written

    def write_again(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take a call down that came like this in the pass before; ``NotImplemented`` for any other."""
        again = self._again
        if again is None:
            return NotImplemented
        index = len(again.came)
        if index == 0 and again.before.autocast != _autocast_of(args):
            return NotImplemented
        result = again.write(function, args, kwargs, self._held.get(index, _NOTHING))
        if result is NotImplemented or self.segment.start + index != self.last:
            return result
        return self._compute(again.before, again.inputs, again.held, result)

    def write(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take a call down; with the last one compute all, and return its real result."""
        result = self.write_again(function, args, kwargs)
        if result is not NotImplemented:
            return result
        self._write_anew()
        last = self.next_call == self.last
        result = self._take(function, args, kwargs)
        return self._finish(result) if last else result

    def _take(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[int, Tensor] | None = None
    ) -> Any:
        program = self.program
        index, call = len(program.entries), recognize(function, args, kwargs)
        if index == 0:
            program.autocast = _autocast_of(args)
        if isinstance(call, WeightCall) and isinstance(call.weight, nn.Parameter):
            linear = isinstance(call.operator, Linear) and not isinstance(call, RecurrentCall)
            program.weights[index] = WrittenWeight(call.weight, linear)
        if call is not None and kind_of(call).keeps(call) is not Keeps.NOTHING:
            program.keeping.add(index)
        program.loss = (True, call.mean) if isinstance(call, LossCall) else (False, False)
        return program.write(function, args, kwargs, self._held.get(index, _NOTHING), given)

    def _write_anew(self) -> None:
        """Write down what came so far, which was only compared: from here on, something is not as it was before."""
        again, self._again = self._again, None
        for came in () if again is None else again.came:
            if came is None:
                self.program.skip()
            else:
                self._take(*canonical(*came), again.held if again is not None else None)  # compared as it came

    def skip_to(self, place: int) -> None:
        """Leave out the calls in front of ``place``: they do not belong to the segment."""
        while self.next_call < place:
            if self._again is not None and self._again.skip():
                continue
            self._write_anew()
            self.program.skip()

    def _finish(self, result: Any) -> Any:
        program, segment = self.program, self.segment
        program.close([(call - segment.start, place) for call, place in segment.outputs])
        program.draws = any(draws_numbers(entry.function, entry.args, entry.kwargs) for entry in program.entries)
        whole = max(program.batch, 1)
        program.samples_at_once = whole if program.full_batch else _samples_at_once(program)
        inputs, held = program.inputs, program.held
        program.let_go()
        return self._compute(program, inputs, held, result)

    def _compute(self, program: Program, inputs: list[Tensor], held: Mapping[int, Tensor], result: Any) -> Any:
        """Compute all; put what was missing into the last call's result."""
        self.program = program  # serves the next pass
        slots = program.wanted
        places = {id(program.fakes[slot]): place for place, slot in enumerate(slots)}
        # In the order of the calls, the same in every process: a set of identities has another one in each.
        identities = dict.fromkeys(id(call.weight) for call in program.weights.values())
        find = self._handlers.trained
        trained = {identity: found for identity in identities if (found := find(identity)) is not None}
        in_chunks = not program.full_batch
        averages = program.loss[1] and in_chunks
        axes = [program.output_axes.get(slot) if in_chunks else None for slot in slots]
        recipe = Recipe(
            run=self._runner(program, frozenset(trained), in_chunks),
            input_axes=program.input_axes,
            output_axes=[*axes, None] if averages else axes,
            batch=max(program.batch, 1),
            samples_at_once=program.samples_at_once,
            averages=averages,
            leaves=[leaf for _, leaf in trained.values()],
            draws=program.draws,
            check=_check(trained),
        )
        real = recomputed(recipe, inputs, [held.get(slot) for slot in slots])
        return tree_map(lambda leaf: real[places[id(leaf)]] if id(leaf) in places else leaf, result)

    def _runner(self, program: Program, trained: frozenset[int], in_chunks: bool) -> Run:
        """How the program is computed while these weights have channels that train."""
        runner: Run | None = program.runners.get(trained)
        if runner is None:
            runner = Runner(
                program,
                trained,
                [step.action for step in self._steps[self.segment.start : self.last + 1]],
                in_chunks,
                self._handlers,
                self._commit,
            )
            program.runners.clear()
            program.runners[trained] = runner
        return runner


_NOTHING: list[int] = []


def _autocast_of(args: tuple[Any, ...]) -> torch.dtype | None:
    return next((autocast_dtype_on(tensor.device) for tensor in tensors_among(args)), None)


def _samples_at_once(program: Program) -> int:
    on_cpu = program.device is None or real_type(program.device) == "cpu"
    largest = max((t.numel() * t.element_size() for t in program.fakes), default=1)
    chunks = -(-largest // (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_ELSEWHERE))
    return -(-program.batch // max(1, min(chunks, program.batch)))


def _check(trained: dict[int, tuple[SelectedChannels, Tensor]]) -> Callable[[], None]:
    def check() -> None:
        for selected, _ in trained.values():
            selected.check_current()

    return check


def refuse_fakes(output: Any) -> None:
    """Refuse what a model returns where it has no values.

    Raises:
        ModelError: A tensor in it stands for an activation that was let go.

    """
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_iter(output)):
        raise ModelError(
            "the model handed out an activation that the traced forward pass let go: "
            'prepare with an example that asks for it too (output_attentions=True), or with recompute="none"'
        )
