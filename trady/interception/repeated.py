"""A segment that comes again: compared call by call with the program of the pass before, instead of written anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from trady.interception.places import SCALARS
from trady.interception.program import Program, layout_of, real_in_place_of
from trady.interception.written import Input, Sizes, Slot

#: A call as it came: function, positional and keyword arguments; ``None`` does not belong to the program.
Came = tuple[Any, tuple[Any, ...], dict[str, Any]] | None


class RepeatedProgram:
    """Follows a program of an earlier pass as long as the same calls come with the same arguments.

    Args:
        before: The program.

    Attributes:
        inputs: The tensors from outside of this pass.
        held: By slot, the tensor with memory that the model holds.
        came: All that came so far.
    """

    def __init__(self, before: Program) -> None:
        self.before = before
        self.inputs: list[Tensor] = []
        self.held: dict[int, Tensor] = {}
        self.came: list[Came] = []
        self._now = list(before.fakes)
        self._slots = {id(fake): slot for slot, fake in enumerate(before.fakes)}
        self._ids: set[int] = set()

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for something that the program makes."""
        return id(tensor) in self._slots

    def skip(self) -> bool:
        """Leave the place of a call empty, as it was before; false where it was not."""
        index = len(self.came)
        if index >= len(self.before.entries) or self.before.entries[index].function is not None:
            return False
        self.came.append(None)
        return True

    def write(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], held: list[int]) -> Any:
        """Return what stood for the result of this call; ``NotImplemented`` where it differs from the one before.

        Args:
            function: The torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            held: As for :meth:`Program.write`.

        """
        index, before, known = len(self.came), self.before, len(self.inputs)
        if index >= len(before.entries):
            return NotImplemented
        entry = before.entries[index]
        if not (
            entry.function is not None
            and entry.function == function
            and self._are(entry.args, args)
            and entry.kwargs.keys() == kwargs.keys()
            and all(self._is(then, kwargs[name]) for name, then in entry.kwargs.items())
        ):
            for tensor in self.inputs[known:]:
                self._ids.discard(id(tensor))
            del self.inputs[known:]
            return NotImplemented
        self.came.append((function, args, kwargs))
        for place in held:
            slot = entry.outputs[place]
            if slot not in self.held:
                real = real_in_place_of(before.fakes[slot], before.device)
                self.held[slot] = self._now[slot] = real
                self._slots[id(real)] = slot
        result = before.results[index]
        return tree_map(self._as_held, result) if self.held else result

    def _as_held(self, value: Any) -> Any:
        slot = self._slots.get(id(value)) if isinstance(value, Tensor) else None
        return value if slot is None else self.held.get(slot, value)

    def _are(self, then: Any, now: Any) -> bool:
        if len(then) != len(now):
            return False
        return all(map(self._is, then, now))

    def _is(self, then: Any, now: Any) -> bool:
        kind = type(then)
        if kind is Slot:
            return now is self._now[then.index] or self._slots.get(id(now)) == then.index
        if kind is Input:
            place = then.index
            if place < len(self.inputs):
                return now is self.inputs[place]
            return place == len(self.inputs) and self._takes(place, now)
        if kind is Sizes:
            return type(now) is int and now == then.per_sample * self.before.batch
        if kind is list or kind is tuple:
            return isinstance(now, (list, tuple)) and self._are(then, now)
        if kind is slice:
            cut = type(now) is slice
            return cut and self._are((then.start, then.stop, then.step), (now.start, now.stop, now.step))
        if kind is dict:
            same = type(now) is dict and then.keys() == now.keys()
            return same and all(self._is(value, now[name]) for name, value in then.items())
        return now is then or (type(now) is kind and kind in SCALARS and bool(now == then))

    def _takes(self, place: int, tensor: Any) -> bool:
        """Take a tensor from outside if it is like the one before: of a parameter, the same."""
        parameter, kind = self.before.parameters.get(place), type(tensor)
        if parameter is not None:
            fits = tensor is parameter and self._layout_is(place, tensor)
        else:
            fits = kind is Tensor and not hasattr(tensor, "trady_transposes") and self._layout_is(place, tensor)
        if not fits or id(tensor) in self._ids or id(tensor) in self._slots:
            return False
        self.inputs.append(tensor)
        self._ids.add(id(tensor))
        return True

    def _layout_is(self, place: int, tensor: Tensor) -> bool:
        before = self.before
        return tensor.device == before.devices[place] and layout_of(tensor) == before.input_layouts[place]
