"""JSON values read as what they are said to be: the types of a dataclass's fields are the schema of its record.

    read(Layer, {"name": "conv1", "channels": 3})

A value of another type, a missing entry, a number that is not finite or does not fit in 64 bits, and text that cannot
be written again (half a surrogate pair) are refused with the place where they stand. Numbers are not made from text,
nor truth values from numbers. Entries that the dataclass does not have are left out: totals beside the values, and
what a later version adds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

#: Whole numbers are from -2**63 to 2**63 - 1, as NumPy, PyTorch and Parquet have them.
_BITS = 63

#: Free-form entries (settings of a run) may be nested so deep, far from the interpreter's limit.
_DEEPEST = 32

_Reader = Callable[[object], Any]


class MismatchError(ValueError):
    """A value that is not what the schema says.

    Args:
        what: What is wrong, after "it" or a place: ``is 'x', not a whole number``.
        place: Where: names and positions, the outermost first.
    """

    def __init__(self, what: str, place: tuple[str | int, ...] = ()) -> None:
        self.what, self.place = what, place
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
        super().__init__(f"{path or 'it'} {what}")


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The smallest number that a field takes, for ``Annotated``."""

    least: float


Natural = Annotated[int, AtLeast(0)]
"""A whole number from 0."""

Positive = Annotated[int, AtLeast(1)]
"""A whole number from 1."""


def read(kind: type[T], value: object) -> T:
    """Return a JSON value as an object of a type.

    Args:
        kind: A dataclass, ``int``, ``float``, ``str``, ``bool``, ``None``, an enumeration, ``Any``; or ``tuple``,
            ``list``, ``Sequence``, ``dict``, ``Mapping``, ``Literal``, a union or ``Annotated`` of these.
        value: What :func:`json.loads` returned.

    Raises:
        MismatchError: It is something else.
    """
    return cast(T, _reader(cast(Any, kind))(value))


def shown(value: object) -> str:
    """Return a value for a message: short, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if value is None or isinstance(value, (bool, int, float)):
        return "null" if value is None else str(value)[:40].lower()
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"


@functools.lru_cache(maxsize=512)
def _reader(kind: Any) -> _Reader:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return _anything
    if origin is Annotated:
        return _bounded(_reader(parts[0]), parts[1:])
    if origin is Literal:
        return _one_of(parts)
    if origin in (Union, types.UnionType):
        return _union(parts)
    if origin in (list, Sequence, tuple) or getattr(origin, "__name__", "") == "Sequence":
        return _items(_reader(parts[0]) if parts else _anything, list if origin is list else tuple)
    if origin is dict or getattr(origin, "__name__", "") == "Mapping":
        return _entries(_reader(parts[1]))
    if dataclasses.is_dataclass(kind):
        return _fields(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(kind)
    return _PLAIN[kind]


def _none(value: object) -> None:
    if value is not None:
        raise MismatchError(f"is {shown(value)}, not null")


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise MismatchError(f"is {shown(value)}, not true or false")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MismatchError(f"is {shown(value)}, not a whole number")
    if value.bit_length() > _BITS:
        raise MismatchError("is a number that does not fit in 64 bits")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MismatchError(f"is {shown(value)}, not a number")
    if not isinstance(value, float):
        return float(_whole(value))
    if not math.isfinite(value):
        raise MismatchError(f"is {value}, not a finite number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise MismatchError(f"is {shown(value)}, not a text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise MismatchError("holds half a character")
    return value


def _anything(value: object, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise MismatchError(f"is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (list, tuple)):
        return [_anything(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_text(key): _anything(item, depth + 1) for key, item in value.items()}
    return value


_PLAIN: Mapping[Any, _Reader] = {
    bool: _truth,
    int: _whole,
    float: _number,
    str: _text,
    None: _none,
    types.NoneType: _none,
    dict: lambda value: _anything(_object(value)),
}


def _bounded(inner: _Reader, limits: tuple[Any, ...]) -> _Reader:
    least = next(limit.least for limit in limits if isinstance(limit, AtLeast))

    def read_bounded(value: object) -> Any:
        found = inner(value)
        if found < least:
            raise MismatchError(f"is {found}; the smallest possible is {least}")
        return found

    return read_bounded


def _one_of(possible: tuple[Any, ...]) -> _Reader:
    def read_literal(value: object) -> Any:
        if not isinstance(value, (str, int, type(None))) or value not in possible:
            raise MismatchError(f"is {shown(value)}; possible are {', '.join(map(shown, possible))}")
        return value

    return read_literal


def _member(kind: type[Enum]) -> _Reader:
    literal = _one_of(tuple(member.value for member in kind))
    return lambda value: kind(literal(value))


def _union(parts: tuple[Any, ...]) -> _Reader:
    readers = [_reader(part) for part in parts]

    def read_union(value: object) -> Any:
        wrong: list[MismatchError] = []
        for reader in readers:
            try:
                return reader(value)
            except MismatchError as mismatch:
                wrong.append(mismatch)
        # The first alternative is the one that people mean; what is wrong deep inside of one says most.
        raise max(wrong, key=lambda mismatch: len(mismatch.place))

    return read_union


def _items(inner: _Reader, make: type[list[Any]] | type[tuple[Any, ...]]) -> _Reader:
    def read_items(value: object) -> Any:
        if not isinstance(value, (list, tuple)):  # tuples: a state that never was JSON
            raise MismatchError(f"is {shown(value)}, not a list")
        found = []
        for place, item in enumerate(value):
            with _inside(place):
                found.append(inner(item))
        return make(found)

    return read_items


def _entries(inner: _Reader) -> _Reader:
    def read_entries(value: object) -> dict[str, Any]:
        found = {}
        for key, item in _object(value).items():
            with _inside(key):
                found[_text(key)] = inner(item)
        return found

    return read_entries


def _fields(kind: Any) -> _Reader:
    types_of = get_type_hints(kind, include_extras=True)
    wanted = [field for field in dataclasses.fields(kind) if field.init]
    readers = {field.name: _reader(types_of[field.name]) for field in wanted}
    missing = dataclasses.MISSING
    needed = {field.name for field in wanted if field.default is missing and field.default_factory is missing}

    def read_fields(value: object) -> Any:
        given, found = _object(value), {}
        for name, reader in readers.items():
            if name in given:
                with _inside(name):
                    found[name] = reader(given[name])
            elif name in needed:
                raise MismatchError(f"lacks {name!r}")
        return kind(**found)

    return read_fields


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MismatchError(f"is {shown(value)}, not an object")
    return value


class _inside:  # noqa: N801 - a context manager, called like a function; a generator would be five times slower
    """Put a place before that of a mismatch."""

    __slots__ = ("_part",)

    def __init__(self, part: str | int) -> None:
        self._part = part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MismatchError):
            part = self._part if isinstance(self._part, int) else shown(self._part).strip("'\"")
            raise MismatchError(error.what, (part, *error.place)) from None
