"""The calls of a program with their arguments bound: registers, and what is taken from which of them.

A program is computed in every pass, and once more in the backward pass, chunk by chunk. Where its arguments lie does
not change; so each call takes them from registers by place, and what is known of a call is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter

from trady.calls.kind import Bound
from trady.interception.written import Entry, Input, Sizes, Slot

#: Computes one call: function, positional and keyword arguments, place in the program.
Compute = Callable[[Any, tuple[Any, ...], dict[str, Any], int], Any]

#: From place, function and arguments to what computes the call from now on; ``None`` is PyTorch's own function.
Bind = Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Bound | None]

_Registers = list[Any]


class _Line:
    """One call: where its arguments lie, where its results go, and which registers are not read any more."""

    __slots__ = ("args", "bound", "built", "function", "gone", "index", "known", "kwargs", "names", "outputs")

    def __init__(self, index: int, entry: Entry) -> None:
        self.index, self.function = index, entry.function
        self.built: list[tuple[int, Callable[[_Registers], Any]]] = []
        self.args: Callable[[_Registers], tuple[Any, ...]] = _nothing
        self.kwargs: Callable[[_Registers], tuple[Any, ...]] | None = None
        self.names: tuple[str, ...] = tuple(entry.kwargs)
        self.outputs: tuple[int, ...] = ()
        self.gone: tuple[int, ...] = ()
        self.known = False
        self.bound: Bound | None = None


class FlatProgram:
    """The calls of a program, to be computed again and again.

    Args:
        entries: The calls.
        inputs: Tensors from outside that they read.
        wanted: Slots of what is asked for.
    """

    def __init__(self, entries: Iterable[Entry], inputs: int, wanted: tuple[int, ...]) -> None:
        entries = list(entries)
        slots = 1 + max((slot for entry in entries for slot in entry.outputs), default=-1)
        self._inputs, self._wanted = inputs, [inputs + slot for slot in wanted]
        self._start: _Registers = [None] * (inputs + slots)
        self._sizes: list[tuple[int, int]] = []
        self._lines = [self._line(index, entry) for index, entry in enumerate(entries) if entry.function is not None]

    def _line(self, index: int, entry: Entry) -> _Line:
        line = _Line(index, entry)
        line.args = _taken([self._register(value, line) for value in entry.args])
        if entry.kwargs:
            line.kwargs = _taken([self._register(value, line) for value in entry.kwargs.values()])
        line.outputs = tuple(self._inputs + slot for slot in entry.outputs)
        line.gone = tuple(self._inputs + slot for slot in entry.gone)
        return line

    def _register(self, value: Any, line: _Line) -> int:
        """The register in which an argument lies; what is put together of others gets one of its own."""
        if type(value) is Slot:
            return self._inputs + value.index
        if type(value) is Input:
            return value.index
        place = len(self._start)
        self._start.append(None)
        if type(value) is Sizes:
            self._sizes.append((place, value.per_sample))
        elif (build := self._builder(value, line)) is not None:
            line.built.append((place, build))
        else:
            self._start[place] = value
        return place

    def _builder(self, value: Any, line: _Line) -> Callable[[_Registers], Any] | None:
        """What puts a list, a mapping or a slice together; ``None`` where nothing in it changes."""
        kind = type(value)
        if kind not in (tuple, list, dict, slice) or not _refers(value):
            return None
        if kind is dict:
            names, parts = tuple(value), [self._register(v, line) for v in value.values()]
            return lambda registers: {n: registers[p] for n, p in zip(names, parts, strict=True)}
        inside = (value.start, value.stop, value.step) if kind is slice else value
        places = [self._register(v, line) for v in inside]
        if kind is slice:
            return lambda registers: slice(*[registers[p] for p in places])
        return lambda registers: kind([registers[p] for p in places])

    def run(self, inputs: list[Tensor], samples: int, compute: Compute, bind: Bind) -> list[Tensor]:
        """Compute the calls on the full batch or a chunk of it.

        Args:
            inputs: The tensors from outside, for these samples.
            samples: How many they are.
            compute: Computes a call that is not bound, or that is another than it was bound for.
            bind: Asked once about each call, which it computes as ``compute`` would.

        Returns:
            What is asked for, in order.

        """
        registers = [*inputs, *self._start[self._inputs :]]
        for place, per_sample in self._sizes:
            registers[place] = per_sample * samples
        for line in self._lines:
            for place, build in line.built:
                registers[place] = build(registers)
            args = line.args(registers)
            kwargs = {} if line.kwargs is None else dict(zip(line.names, line.kwargs(registers), strict=True))
            if not line.known:
                line.bound, line.known = bind(line.index, line.function, args, kwargs), True
            if line.bound is None:
                out = line.function(*args, **kwargs)
            else:
                out = line.bound(args, kwargs)
                if out is NotImplemented:
                    out = compute(line.function, args, kwargs, line.index)
            del args, kwargs
            if isinstance(out, Tensor):
                registers[line.outputs[0]] = out
            else:
                _spread(registers, line.outputs, out)
            del out
            for place, _ in line.built:
                registers[place] = None
            for place in line.gone:
                registers[place] = None
        return [registers[place] for place in self._wanted]


def _spread(registers: _Registers, places: tuple[int, ...], out: Any) -> None:
    for place, tensor in zip(places, (t for t in tree_iter(out) if isinstance(t, Tensor)), strict=True):
        registers[place] = tensor


def _nothing(registers: _Registers) -> tuple[Any, ...]:
    return ()


def _taken(places: list[int]) -> Callable[[_Registers], tuple[Any, ...]]:
    if not places:
        return _nothing
    if len(places) == 1:
        place = places[0]
        return lambda registers: (registers[place],)
    return itemgetter(*places)


def _refers(value: Any) -> bool:
    """Whether there is a tensor or a size in a structure that changes from pass to pass."""
    if type(value) in (Slot, Input, Sizes):
        return True
    if isinstance(value, (tuple, list)):
        return any(map(_refers, value))
    if isinstance(value, dict):
        return any(map(_refers, value.values()))
    return isinstance(value, slice) and any(map(_refers, (value.start, value.stop, value.step)))
