"""Ctrl-C, SIGTERM and SIGHUP between two steps.

A ``KeyboardInterrupt`` inside a destructor or the callback of a weak reference is printed and lost, and one inside
a step leaves the step half done. So the first signal is noted and raised at the end of the step, when the run can be
saved; a second Ctrl-C stops at once. Who sends SIGTERM (a scheduler, a machine that shuts down) does not wait for
long: a step that has not ended in time is left as it is, with the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

#: How long a step may take to end after SIGTERM or SIGHUP. Schedulers kill after 10 s (Docker) to 90 s (systemd).
LEAVE_SECONDS = 8.0

#: What ends a process unless it is handled; not all systems have all of them.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(SystemExit):
    """SIGTERM or SIGHUP, after the run was saved: ends the process with 128 + the signal's number, as shells say it.

    Attributes:
        signal: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Interrupts:
    """Holds signals back inside ``with Interrupts() as interrupts`` until :meth:`check` is called.

    Args:
        last_words: What to say if a step does not end in time; given the signal's name.
    """

    def __init__(self, last_words: Callable[[str], str] = "stopped by {}".format) -> None:
        self._noted: int | None = None
        self._before: dict[int, Any] = {}
        self._last_words = last_words
        self._over = threading.Event()
        self._wakeup: tuple[int, int] | None = None

    @property
    def noted(self) -> int:
        """The number of the signal that has come; 0 where none has."""
        return self._noted or 0

    def note(self, number: int) -> None:
        """Take a signal that has come to another process of the run as one that has come here."""
        self._noted = number

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            # A handler of the user's own is left alone, and so is what nohup ignores.
            usual = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(_ENDING, signal.SIG_DFL)}
            for number, handler in usual.items():
                if signal.getsignal(number) is handler or signal.getsignal(number) == handler:
                    self._before[number] = signal.signal(number, self._note)
            if set(_ENDING) & set(self._before):
                self._watch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._over.set()
        if self._wakeup is not None:
            writing, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(writing)
            self._wakeup = None
        # A signal to all processes of a group ends readers of data too, which raises whatever it raises.
        if kind is None or issubclass(kind, Exception):
            self.check()

    def check(self) -> None:
        """Raise what was noted: ``KeyboardInterrupt``, or :class:`Stopped`."""
        number, self._noted = self._noted, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise Stopped(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._noted = number

    def _watch(self) -> None:
        """Watch for signals from beside the main thread, which sees them only between two operations of Python's."""
        self._over.clear()
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._wakeup = writing, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._leave_in_time, args=(reading,), name="trady-signals", daemon=True).start()

    def _leave_in_time(self, reading: int) -> None:
        """End the process after SIGTERM or SIGHUP where a step goes on for too long."""
        try:
            while numbers := os.read(reading, 64):
                for number in numbers:
                    if number in _ENDING and not self._over.wait(LEAVE_SECONDS):
                        sys.stderr.write(self._last_words(signal.Signals(number).name) + "\n")
                        sys.stderr.flush()
                        os._exit(128 + number)
        finally:
            os.close(reading)


def agree_to_stop(interrupts: Interrupts, accelerator: Accelerator, *, due: bool = False) -> tuple[bool, bool]:
    """Return whether a checkpoint is due in the main process, and whether a signal has come to any process."""
    number = interrupts.noted
    if accelerator.num_processes > 1:
        mine = [int(due and accelerator.is_main_process), number]
        together = torch.tensor(mine, device=accelerator.device)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        due, number = bool(together[0]), int(together[1])
        if number:
            interrupts.note(number)
    return due, bool(number)
