"""What a command says to people beside its result: on standard error, and in a log file."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from trady.errors import FileError, TradyWarning

if TYPE_CHECKING:
    from rich.console import Console

#: Lines of a log are not wrapped.
_WIDE = 1000

#: Loggers of libraries that warn of their own affairs when they are imported.
_LOGGERS = ("torchao", "torch.utils._pytree")

#: Where a context keeps its messages.
MESSAGES = "trady messages"


class Messages:
    """Where messages go.

    Attributes:
        quiet: Whether nothing is said on standard error but warnings and errors.
        wording: Makes a message of the library one of the command line.
        log: The log file, if there is one.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.wording: Callable[[str], str] = str
        self.log: _Stamped | None = None

    def say(self, text: str) -> None:
        """Say something that is good to know."""
        if not self.quiet:
            print(_printable(text), file=sys.stderr)  # noqa: T201
        self.record(text)

    def warn(self, text: str) -> None:
        """Say something that a person has to look at."""
        print(_printable(f"warning: {text}"), file=sys.stderr)  # noqa: T201
        self.record(f"warning: {text}")

    def record(self, text: str) -> None:
        """Write something to the log file only."""
        if self.log is not None:
            self.log.write(f"{_printable(text)}\n")
            self.log.flush()

    def open_log(self, path: str) -> None:
        """Append to a log file from now on.

        Raises:
            FileError: It cannot be written.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.log = _Stamped(Path(path))
        except OSError as error:
            raise FileError(f"--log-file {path} cannot be written: {error.strerror or error}") from error

    @property
    def log_console(self) -> Console | None:
        """The log file, for progress."""
        from rich.console import Console

        return None if self.log is None else Console(file=cast("TextIO", self.log), width=_WIDE)

    def close(self) -> None:
        """Close the log file."""
        if self.log is not None:
            self.log.close()
            self.log = None

    @contextmanager
    def instead_of_warnings(self, *, everything: bool) -> Iterator[None]:
        """Say warnings of trady's like other messages, and leave out what other libraries warn and log of themselves.

        Args:
            everything: Leave nothing out.
        """

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, TradyWarning):
                self.warn(self.wording(str(message)))
            elif everything:
                self.warn(f"{filename}:{lineno}: {category.__name__}: {message}")

        loggers = [] if everything else [logging.getLogger(name) for name in _LOGGERS]
        for logger in loggers:
            logger.addFilter(_is_error)
        before, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        finally:
            warnings.showwarning = before
            for logger in loggers:
                logger.removeFilter(_is_error)


def _printable(text: str) -> str:
    """Return a text that can be printed: names of files need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class _Stamped(io.TextIOBase):
    """A text file whose lines begin with the time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._starts = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            if self._starts and line.strip():
                self._file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} ")
            self._file.write(line)
            self._starts = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            super().close()  # flushes
            self._file.close()
