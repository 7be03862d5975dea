"""What is written with a format and a version, and how anything else is refused: the one way in which files are read.

A record starts with ``{"format": NAME, "version": N}``. Whatever reads it says the same of the same mistake: another
format, another version, a missing entry, a value of another type (:mod:`trady.records.schema`), a file that cannot be
read. The class of the error is the record's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trady.errors import ResourceError, TradyError
from trady.records import schema
from trady.records.reading import check_regular, read_bytes
from trady.records.translated import in_our_words

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """One kind of record.

    Attributes:
        name: ``format`` of the header; ``None`` for a record without a header.
        noun: What users call it, as in "this is no <noun>".
        error: Raised for a record that cannot be read.
        remedy: What to do about one that is damaged, or of another version.
        elsewhere: What to do about something else in its place; the same when left out.
        version: The version that is written; ``None`` where the name says it; without a name there is none.
        reads: Earlier versions that are read as well.
        changed: What is another since the version before, for those who have a record of that.
    """

    name: str | None
    noun: str
    error: type[TradyError]
    remedy: str
    elsewhere: str = ""
    version: int | None = 1
    changed: str = ""
    reads: tuple[int, ...] = ()

    def header(self) -> dict[str, Any]:
        """Return the first entries of a record."""
        version = {} if self.version is None else {"version": self.version}
        return {"format": self.name, **version}

    def read(self, kind: type[T], data: object) -> T:
        """Return a record as an object of a type, if its header is this format's.

        Args:
            kind: A dataclass; its fields are the entries, with their types (:func:`trady.records.schema.read`).
            data: JSON values.

        Raises:
            TradyError: Of class ``error``: it is something else, of another version, or an entry is missing or wrong.
        """
        checked = self.check(data)
        with self.reading():
            return schema.read(kind, checked)

    def check(self, data: object) -> Mapping[str, Any]:
        """Return the record, if its header is this format's.

        Raises:
            TradyError: Of class ``error``: it is something else, or of another version.
        """
        given = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if not isinstance(data, Mapping) or given != self.name:
            its = f"its format is {schema.shown(given)}" if isinstance(data, Mapping) else f"it is a {given}"
            expected = f"{its}, not {self.name!r}" if self.name else its
            raise self.error(f"this is no {self.noun} ({expected}); {self.elsewhere or self.remedy}")
        if None not in (self.name, self.version) and not self._reads(data.get("version")):
            reason = f" ({self.changed})" if self.changed else ""
            found = schema.shown(data.get("version"))
            read = " and ".join(map(str, (self.version, *self.reads)))
            raise self.error(
                f"the {self.noun} is of version {found}, this trady reads version {read}{reason}: "
                f"use the trady that wrote it, or {self.remedy}"
            )
        return data

    def _reads(self, version: object) -> bool:
        # True equals 1, and is none.
        return type(version) is int and version in (self.version, *self.reads)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what goes wrong while entries are read into an error of class ``error``."""
        try:
            yield
        except (self.error, MemoryError):
            raise
        except schema.MismatchError as error:
            raise self.error(f"the {self.noun} is damaged: {error}; {self.remedy}") from error
        except KeyError as error:
            raise self.error(f"the {self.noun} is damaged: it lacks {error}; {self.remedy}") from error
        except (ArithmeticError, AttributeError, IndexError, RecursionError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise self.error(f"the {self.noun} is damaged ({reason}); {self.remedy}") from error

    def read_json(self, path: str | os.PathLike[str]) -> Any:
        """Return what a JSON file holds.

        Raises:
            TradyError: Of class ``error``: it cannot be read, or is cut short.
        """
        with self._opening(path):
            return json.loads(read_bytes(path).decode("utf-8"))

    def read_lines(self, kind: type[T], path: str | os.PathLike[str], *, until_damage: bool = False) -> list[T]:
        """Return the records of a file with one in each line.

        Args:
            kind: As in :meth:`read`.
            path: The file.
            until_damage: Stop at the first line that cannot be read, which a kill may have cut short.

        Raises:
            TradyError: Of class ``error``: the file cannot be read, or a line is damaged.
        """
        with self._opening(path):
            lines = read_bytes(path).split(b"\n")
        found: list[T] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                with self.named(f"{os.fspath(path)}, line {number}"), self._opening("it"):
                    found.append(self.read(kind, json.loads(line.decode("utf-8"))))
            except self.error:
                if until_damage:
                    break
                raise
        return found

    def read_tensors(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """Return the tensors of a safetensors file.

        Raises:
            TradyError: Of class ``error``: it cannot be read, or is cut short.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with self._opening(path):
            check_regular(path)
            try:
                return load_file(path)
            except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError) as error:
                raise ValueError(error) from error

    @contextmanager
    def _opening(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Turn what goes wrong while a file is opened and decoded into an error of class ``error``."""
        try:
            yield
        except TradyError:
            raise
        except (MemoryError, OSError) as error:
            if isinstance(lack := in_our_words(error), ResourceError):
                raise lack from error
            said = getattr(error, "strerror", None) or error
            raise self.error(f"cannot read the {self.noun} {path}: {said}; {self.remedy}") from error
        except (ValueError, RecursionError) as error:
            raise self.error(f"{path} is no {self.noun}, or is cut short ({error}); {self.remedy}") from error

    def load(self, path: str | os.PathLike[str], from_json: Callable[[Any], T]) -> T:
        """Read a file; every message starts with its name.

        Args:
            path: The file.
            from_json: Reads the record that it holds.

        Raises:
            TradyError: Of class ``error``, as in :meth:`read_json`, :meth:`check` and :meth:`reading`.
        """
        data = self.read_json(path)
        with self.named(path):
            return from_json(data)

    @contextmanager
    def named(self, place: str | os.PathLike[str]) -> Iterator[None]:
        """Put the name of a file or folder before what an error says."""
        try:
            yield
        except self.error as error:
            raise self.error(f"{place}: {error}") from error
