"""What modules keep in Python, remembered and put back: attributes, lists, dicts, objects, random generators.

Everything is put back in content and in identity: the same list, holding the same things. Nothing is copied deeply.
Found is what attributes of the modules lead to, through containers, bound methods, partial functions and objects of the
user's own. Not looked into are functions (what they close over), classes, and objects of PyTorch, of Python's library
and of trady. Out of reach are the elements of NumPy arrays and byte arrays, iterators, and what lies outside of Python.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: A part of an object that can change: how it is read, and how it is written.
Part = tuple[Callable[[Any], list[Any]], Callable[[Any, list[Any]], None]]


@dataclass(frozen=True)
class _Kind:
    """How objects of one class are remembered.

    What their parts hold is looked at next, unless they are opaque, and so is what they lead to.
    """

    parts: tuple[Part, ...] = ()
    leads_to: Callable[[Any], Iterable[Any]] | None = None
    opaque: bool = False


class PythonState:
    """The Python state of modules as it is now.

    Args:
        roots: Modules, or batches that they are called with.

    Attributes:
        tensors: All tensors that were found, each once.
        generators: All random generators that were found.

    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []
        self._found: list[tuple[Any, Part, list[Any]]] = []
        kinds: dict[type, _Kind] = {}
        seen: set[int] = set()
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            kind = kinds.get(type(value))
            if kind is None:
                kind = kinds[type(value)] = _kind_of(type(value))
            if kind is _LEAF or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                self.tensors.append(value)
            if kind.opaque:
                self.generators.append(value)
            for part in kind.parts:
                content = part[0](value)
                self._found.append((value, part, content))
                if not kind.opaque:
                    waiting += content
            if kind.leads_to is not None:
                waiting += kind.leads_to(value)

    @property
    def changed(self) -> bool:
        """Whether anything has changed but the state of random generators."""
        opaque = {id(generator) for generator in self.generators}
        pairs = ((read(value), content) for value, (read, _), content in self._found if id(value) not in opaque)
        return any(len(now) != len(then) or not all(map(operator.is_, now, then)) for now, then in pairs)

    def restore(self) -> None:
        """Put everything back that has changed."""
        for value, (read, write), content in self._found:
            now = read(value)
            if len(now) != len(content) or not all(map(operator.is_, now, content)):
                write(value, content)


def reading_state(parts: Iterable[Any]) -> PythonState:
    """Return the state of what data is read with: data sets, samplers, collators, generators; ``None`` is left out.

    They are derived from classes of PyTorch, which a :class:`PythonState` does not look into by itself.
    """
    roots: list[Any] = []
    for part in parts:
        if part is not None and not isinstance(part, (list, Tensor)):
            roots += [part, getattr(part, "__dict__", None)]
    return PythonState(roots)


# -- containers and attributes -------------------------------------------------------------------------
# The methods are those of the built-in classes, since a class of the user's own may do something else in its own.


def _mapping(base: Any) -> Part:
    def read(mapping: Any) -> list[Any]:
        return [*base.keys(mapping), *base.values(mapping)]

    def write(mapping: Any, content: list[Any]) -> None:
        half = len(content) // 2
        base.clear(mapping)
        for key, value in zip(content[:half], content[half:], strict=True):
            base.__setitem__(mapping, key, value)

    return read, write


def _collection(base: Any, extend: Callable[[Any, list[Any]], None]) -> Part:
    def write(collection: Any, content: list[Any]) -> None:
        base.clear(collection)
        extend(collection, content)

    return lambda collection: list(base.__iter__(collection)), write


#: By class; the first that an object is an instance of counts.
_CONTAINERS: dict[type, Part] = {
    OrderedDict: _mapping(OrderedDict),
    dict: _mapping(dict),
    list: _collection(list, list.extend),
    set: _collection(set, set.update),
    deque: _collection(deque, deque.extend),
}

_ENTRIES = _CONTAINERS[dict]


def _attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, without asking its class."""
    found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    return found


_ATTRIBUTES: Part = (
    lambda value: _ENTRIES[0](_attributes_of(value)),
    lambda value, content: _ENTRIES[1](_attributes_of(value), content),
)


_MISSING = object()


def _slot(descriptor: Any) -> Part:
    def read(value: Any) -> list[Any]:
        try:
            return [descriptor.__get__(value)]
        except AttributeError:
            return [_MISSING]

    def write(value: Any, content: list[Any]) -> None:
        if content[0] is _MISSING:
            descriptor.__delete__(value)
        else:
            descriptor.__set__(value, content[0])

    return read, write


def _slots_of(kind: type) -> list[Part]:
    classes = [vars(base) for base in kind.__mro__]
    members = [member for own in classes if "__slots__" in own for member in own.values()]
    return [_slot(member) for member in members if isinstance(member, MemberDescriptorType)]


# -- random generators ---------------------------------------------------------------------------------


def _set_bit_generator(generator: Any, content: list[Any]) -> None:
    generator.bit_generator.state = content[0]


#: The state is a new object each time that it is read, so it is always written back.
_GENERATORS: dict[type, Part] = {
    torch.Generator: (lambda g: [g.get_state()], lambda g, content: g.set_state(content[0])),
    random.Random: (lambda g: [g.getstate()], lambda g, content: g.setstate(content[0])),
    np.random.Generator: (lambda g: [g.bit_generator.state], _set_bit_generator),
    np.random.RandomState: (lambda g: [g.get_state()], lambda g, content: g.set_state(content[0])),
}


# -- classes -------------------------------------------------------------------------------------------

_LEAF = _Kind()

#: Objects whose class comes from there, or from a class from there, are not looked into.
_NOT_THE_USERS = {*sys.stdlib_module_names, "torch", "trady", "numpy"} - {"abc", "builtins", "collections", "typing"}
_NOT_THE_USERS -= {"types"}  # SimpleNamespace


def _kind_of(kind: type) -> _Kind:
    for base, part in _GENERATORS.items():
        if issubclass(kind, base):
            return _LEAF if issubclass(kind, random.SystemRandom) else _Kind((part,), opaque=True)
    if issubclass(kind, (tuple, frozenset)) and kind.__module__ == "builtins":
        return _Kind(leads_to=iter)
    if kind is MethodType:
        return _Kind(leads_to=lambda method: [method.__self__])
    if issubclass(kind, functools.partial):
        return _Kind(leads_to=lambda partial: [partial.func, partial.args, partial.keywords])
    parts = [part for base, part in _CONTAINERS.items() if issubclass(kind, base)][:1]
    ours = issubclass(kind, (nn.Module, Tensor)) or not _is_foreign(kind)
    if ours and kind.__dictoffset__ and not issubclass(kind, type):
        parts.append(_ATTRIBUTES)
    if ours:
        parts += _slots_of(kind)
    leads_to = tuple.__iter__ if issubclass(kind, tuple) else None
    return _Kind(tuple(parts), leads_to) if parts or leads_to is not None else _LEAF


def _is_foreign(kind: type) -> bool:
    """Whether a class, or one that it is derived from, is of a library whose objects are not looked into."""
    if kind.__module__ == "builtins":
        return True
    return any(base.__module__.partition(".")[0] in _NOT_THE_USERS for base in kind.__mro__)


# -- the generators of all -----------------------------------------------------------------------------


class RandomState:
    """The state of the global random generators of Python, NumPy and PyTorch as it is now.

    Generators of an accelerator that nothing has used yet have none.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one models use
        self._torch = torch.get_rng_state()
        self._devices = [(module, module.get_rng_state_all()) for module in _accelerators()]

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for module, states in self._devices:
            module.set_rng_state_all(states)


def generators_of(roots: Iterable[Any]) -> list[Any]:
    """The random generators that modules hold."""
    return PythonState(roots).generators


def seed_generators(seed: int) -> None:
    """Seed PyTorch's generators, but for those of an accelerator that nothing has used yet.

    ``torch.manual_seed`` would seed those as well, later, when nobody puts them back.
    """
    torch.default_generator.manual_seed(seed)
    for module in _accelerators():
        module.manual_seed_all(seed)


def _accelerators() -> Sequence[Any]:
    return [module for module in (torch.cuda, torch.xpu) if module.is_initialized()]
