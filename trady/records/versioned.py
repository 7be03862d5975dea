"""JSON with a format and a version: the header that is written, and how anything else is refused.

A record starts with ``{"format": NAME, "version": N}``. Whatever reads it says the same of the same mistake: another
format, another version, a missing entry, a wrong value, a file that cannot be read. The class of the error is the
record's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trady.errors import TradyError

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
        version: The version that is written and read; ``None`` where the name says it.
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

    def check(self, data: object) -> Mapping[str, Any]:
        """Return the record, if its header is this format's.

        Raises:
            TradyError: Of class ``error``: it is something else, or of another version.
        """
        given = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if not isinstance(data, Mapping) or given != self.name:
            expected = f"its format is {given!r}, not {self.name!r}" if self.name else f"it is a {given}"
            raise self.error(f"this is no {self.noun} ({expected}); {self.elsewhere or self.remedy}")
        if self.version is not None and data.get("version") not in (self.version, *self.reads):
            reason = f" ({self.changed})" if self.changed else ""
            read = " and ".join(map(str, (self.version, *self.reads)))
            raise self.error(
                f"the {self.noun} is of version {data.get('version')!r}, this trady reads version {read}"
                f"{reason}: use the trady that wrote it, or {self.remedy}"
            )
        return data

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what goes wrong while entries are read into an error of class ``error``."""
        try:
            yield
        except self.error:
            raise
        except KeyError as error:
            raise self.error(f"the {self.noun} is damaged: it lacks {error}; {self.remedy}") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise self.error(f"the {self.noun} is damaged ({reason}); {self.remedy}") from error

    def read_json(self, path: str | os.PathLike[str]) -> Any:
        """Return what a JSON file holds.

        Raises:
            TradyError: Of class ``error``: it cannot be read, or is cut short.
        """
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise self.error(f"cannot read the {self.noun} {path}: {error.strerror or error}; {self.remedy}") from error
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
