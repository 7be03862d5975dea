"""A segment of a model's calls, written down while the model runs, to be computed when it is complete.

While a segment is written down the model goes on with tensors without memory; what they stand for exists
when the last call has come. The same program is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from trady.analysis.sample_axes import CallSamples
from trady.calls.canonical import shown_parameter
from trady.calls.decompositions import META_KERNELS
from trady.calls.kinds import NormCall
from trady.calls.recognize import recognize
from trady.model.batch import without_memory
from trady.ops.sample_axis import SampleAxis

_META = torch.device("meta")

#: Computes one call: function, positional and keyword arguments, place in the program.
Compute = Callable[[Any, tuple[Any, ...], dict[str, Any], int], Any]


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor that an earlier call of the program makes."""

    number: int


@dataclass(frozen=True)
class Given:
    """Stands for a tensor from outside of the program, where its samples lie in ``along``."""

    number: int
    along: SampleAxis | None


@dataclass(frozen=True)
class Sizes:
    """Stands for a whole number that grows with the batch."""

    per_sample: int


@dataclass
class Entry:
    """One call: tensors and sizes among its arguments are replaced by :class:`Slot`, :class:`Given`, :class:`Sizes`.

    Attributes:
        function: The torch function; ``None`` for a call that does not belong to the program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        made: Numbers of the slots for what it returns.
        reads: Numbers of the slots that it reads.
        gone: Numbers of slots that nobody reads after it.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[int, ...]
    reads: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()


class Program:
    """The calls of one segment in one forward pass.

    Args:
        samples: Where the samples lie in each call; empty if it cannot be computed in parts.
        before: The program of the same segment in an earlier forward pass: as long as all is as it was then,
            its stand-ins serve again.

    Attributes:
        entries: The calls.
        given: The tensors from outside that they read.
        along: Where the samples lie in those.
        made_along: By slot, where they lie in what the program makes.
        batch: Samples in the batch, where it can be computed in parts.
        whole: Whether it can only be computed on the whole batch at once.
        device: Where it is computed.
        results: What the calls returned to the model, in tensors without memory.
        forms: Shape, strides and type of the tensors from outside.
        standing: By slot, the tensor without memory that stands for what the program makes.
        shown: By slot, the tensor with memory that the model has been given instead.
    """

    def __init__(self, samples: tuple[CallSamples, ...], before: Program | None = None) -> None:
        self.samples = samples
        self.results: list[Any] = []
        self.forms: list[tuple[Any, ...]] = []
        self._before = before
        self.entries: list[Entry] = []
        self.given: list[Tensor] = []
        self.along: list[SampleAxis | None] = []
        self.made_along: dict[int, SampleAxis | None] = {}
        self.batch = 0
        self.whole = not samples
        self.device: torch.device | None = None
        self.standing: list[Tensor] = []
        self.shown: dict[int, Tensor] = {}
        self._slots: dict[int, int] = {}
        self._twins: dict[int, Tensor] = {}

    # -- writing down --------------------------------------------------------------------------------

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for something that the program makes."""
        return id(tensor) in self._slots

    def skip(self) -> None:
        """Leave the place of a call empty that does not belong to the program."""
        self.entries.append(Entry(None, (), {}, ()))
        self.results.append(None)

    def along_now(self, tensor: Tensor, along: SampleAxis | None) -> SampleAxis | None:
        """Where samples lie in a tensor of this batch, whose samples may have other sizes than the traced ones."""
        if along is None or self.whole:
            return None
        size = tensor.shape[along.dim] if along.dim < tensor.dim() else 0
        if size == 1 < self.batch:
            return None  # the same for all samples
        batch = self.batch or size // along.per_sample
        if batch and size % batch == 0 and (along.per_sample > 1 or size == batch):
            self.batch = batch
            return SampleAxis(along.dim, size // batch)
        self.whole = True
        return None

    def write(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shown: Iterable[int] = ()) -> Any:
        """Add a call; return tensors without memory in place of its results.

        Args:
            function: The torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            shown: Places among its results of tensors that the model goes on holding when the segment has
                ended: they have memory from the start.

        """
        index = len(self.entries)
        reader = _Reader(self, self.samples[index] if self.samples else None)
        entry = Entry(function, reader.read(args), reader.read(kwargs), ())
        self.forms += [_form(tensor) for tensor in self.given[len(self.forms) :]]
        out = self._as_before(entry) if self._before is not None else None
        if out is None:
            self._before = None
            out = self._stand_in(function, args, kwargs)
        self.results.append(out)
        made = []
        for place, tensor in enumerate(t for t in tree_iter(out) if isinstance(t, Tensor)):
            slot = self._slots.get(id(tensor))
            if slot is None:
                slot = self._slots[id(tensor)] = len(self.standing)
                self.standing.append(tensor)
                known = self.samples[index].made if self.samples else ()
                self.made_along[slot] = self.along_now(tensor, known[place] if place < len(known) else None)
            if place in shown and slot not in self.shown:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                self.shown[slot] = held
                self._slots[id(held)], self._twins[id(held)] = slot, tensor
            made.append(slot)
        entry.made, entry.reads = tuple(made), tuple(reader.reads)
        self.entries.append(entry)
        return tree_map(self._as_held, out) if self.shown else out

    def _as_before(self, entry: Entry) -> Any:
        """What stood for the result of this call in the forward pass before; ``None`` if something differs."""
        index, before = len(self.entries), self._before
        assert before is not None
        if index >= len(before.entries) or self.forms != before.forms[: len(self.forms)]:
            return None
        then = before.entries[index]
        same = then.function == entry.function and then.args == entry.args and then.kwargs == entry.kwargs
        return before.results[index] if same else None

    def _stand_in(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _disable_current_modes():  # nobody is to count what takes no memory
            bare, named = self._without_memory(args), self._without_memory(kwargs)
            call = recognize(function, bare, named)
            # A normalisation with fixed statistics: PyTorch would refuse one sample with batch statistics.
            if isinstance(call, NormCall):
                return torch.empty_like(call.x)
            return META_KERNELS.get(function, function)(*bare, **named)

    def _as_held(self, value: Any) -> Any:
        slot = self._slots.get(id(value)) if isinstance(value, Tensor) else None
        return value if slot is None else self.shown.get(slot, value)

    def _without_memory(self, value: Any) -> Any:
        """The same arguments with tensors, and devices, that take no memory."""
        if isinstance(value, Tensor):
            twin = self._twins.get(id(value))
            if twin is None and id(value) in self._slots:
                return value
            if twin is None:
                twin = without_memory(value)
                self._twins[id(value)] = twin
            return twin
        if isinstance(value, torch.device):
            return _META
        if type(value) in (tuple, list):
            return type(value)([self._without_memory(v) for v in value])
        if isinstance(value, dict):
            return {k: self._without_memory(v) for k, v in value.items()}
        return value

    def close(self, wanted: list[tuple[int, int]]) -> tuple[int, ...]:
        """End writing; return the slots of what is wanted, given as pairs of call and place."""
        slots = tuple(self.entries[call].made[place] for call, place in wanted)
        last: dict[int, int] = {}
        for index, entry in enumerate(self.entries):
            last.update(dict.fromkeys((*entry.reads, *entry.made), index))
        gone: dict[int, list[int]] = {}
        for slot, index in last.items():
            if slot not in slots:
                gone.setdefault(index, []).append(slot)
        for index, numbers in gone.items():
            self.entries[index].gone = tuple(numbers)
        return slots

    def let_go(self) -> None:
        """Drop the stand-ins and the tensors from outside: they are handed in from now on."""
        self._slots.clear()
        self.standing.clear()
        self.shown = {}
        self._twins.clear()
        self.given = []
        self._before = None

    # -- computing -----------------------------------------------------------------------------------

    def run(self, given: list[Tensor], samples: int, compute: Compute) -> dict[int, Tensor]:
        """Compute the calls on (a part of) the batch.

        Args:
            given: The tensors from outside, for these samples.
            samples: How many they are.
            compute: Computes one call.

        Returns:
            What was asked for in :meth:`close`, by slot.

        """
        made: dict[int, Tensor] = {}
        for index, entry in enumerate(self.entries):
            if entry.function is None:
                continue
            args, kwargs = (_fill(part, made, given, samples) for part in (entry.args, entry.kwargs))
            out = compute(entry.function, args, kwargs, index)
            tensors = [out] if isinstance(out, Tensor) else [t for t in tree_iter(out) if isinstance(t, Tensor)]
            made.update(zip(entry.made, tensors, strict=True))
            del out, tensors, args, kwargs
            for slot in entry.gone:
                made.pop(slot, None)
        return made


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _fill(value: Any, made: dict[int, Tensor], given: list[Tensor], samples: int) -> Any:
    """Arguments with tensors and sizes in them again."""
    kind = type(value)
    if kind is Slot:
        return made[value.number]
    if kind is Given:
        return given[value.number]
    if kind is Sizes:
        return value.per_sample * samples
    if kind is tuple or kind is list:
        return kind(_fill(v, made, given, samples) for v in value)
    if kind is dict:
        return {k: _fill(v, made, given, samples) for k, v in value.items()}
    if kind is slice:
        return slice(*(_fill(v, made, given, samples) for v in (value.start, value.stop, value.step)))
    return value


def _constant(tensor: Tensor, traced: tuple[int, ...] | None) -> bool:
    """Whether a tensor has no dimension that may be one of samples, where the traced one had none."""
    if isinstance(shown_parameter(tensor), nn.Parameter):
        return True
    known = traced is not None and len(traced) == tensor.dim()
    return known and all(now <= 1 or then > 1 for now, then in zip(tensor.shape, traced or (), strict=True))


class _Reader:
    """Replaces the tensors and sizes among the arguments of one call, in the order of the trace."""

    def __init__(self, program: Program, samples: CallSamples | None) -> None:
        self._program = program
        known = zip(samples.tensors, samples.shapes, strict=True) if samples is not None else ()
        self._tensors: Iterator[tuple[SampleAxis | None, tuple[int, ...]]] = iter(known)
        self._numbers: Iterator[bool] = iter(samples.numbers if samples is not None else ())
        self.reads: list[int] = []

    def read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return self._number(value)
        if isinstance(value, (tuple, list)):
            made = [self.read(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, dict):
            return {k: self.read(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.read(value.start), self.read(value.stop), self.read(value.step))
        return value

    def _tensor(self, tensor: Tensor) -> Slot | Given:
        program = self._program
        along, shape = next(self._tensors, (None, None))
        if along is None and not _constant(tensor, shape):
            program.whole = True  # in the trace it did not depend on the sample, maybe it does now
        slot = program._slots.get(id(tensor))
        if slot is not None:
            self.reads.append(slot)
            return Slot(slot)
        along = program.along_now(tensor, along)
        for number, known in enumerate(program.given):
            if known is tensor:
                return Given(number, program.along[number])
        if program.device is None or isinstance(tensor, nn.Parameter):
            program.device = tensor.device
        program.given.append(tensor)
        program.along.append(along)
        return Given(len(program.given) - 1, along)

    def _number(self, number: int) -> int | Sizes:
        grows = next(self._numbers, False)
        if not grows or number < 0:
            return number
        batch = self._program.batch
        if not batch or number % batch:
            self._program.whole = True
            return number
        return Sizes(number // batch)
