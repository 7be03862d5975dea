"""Trials: a run is stopped somehow, started again until it ends, and compared with one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.reliability.task import MISTAKE, NO_ROOM, REFUSED, SETUPS, Run
from trady.errors import TradyError
from trady.training.checkpoint import find_checkpoint, load_checkpoint

#: What a line of the metrics measures with a clock.
CLOCK = ("seconds", "samples_per_second", "observing_seconds", "process_bytes", "process_peak_bytes")

#: How long a process that was asked to stop may take; schedulers kill after that.
LEAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Ending:
    """What a run has left: its files, the weights in them, and its metrics without times."""

    files: frozenset[str]
    weights: dict[str, tuple[Any, bytes]]
    metrics: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Ending:
        """Read a run folder."""
        files = frozenset(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        weights = {name: _tensors(folder / name) for name in sorted(files) if _is_weights(name)}
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]
        return cls(files, weights, metrics)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("checkpoint/")


def _tensors(path: Path) -> tuple[Any, bytes]:
    """Return the description and the content of a safetensors file; it has its metadata in a random order."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@dataclass
class Tally:
    """What came of trials of one kind.

    Attributes:
        kind: What was done to the runs.
        trials: How often.
        training: How often that met a run in training; the others had not begun, or were ending.
        writing: How often it left a file half written.
        within: How often the run went on in the middle of an epoch.
        ended: Runs that were followed to their end.
        refused: Processes that were refused because another one was at work.
        lost: Trials after which a checkpoint that was complete is gone or cannot be read, or work beyond it is lost.
        different: Runs that ended otherwise than the one that was never stopped.
        orphans: Files that were left over at the end.
        mistakes: Processes that ended as no process should.
        slowest_seconds: Longest time between a request to stop and the end of the process.
        said: What went wrong, in words.
    """

    kind: str
    trials: int = 0
    training: int = 0
    writing: int = 0
    within: int = 0
    ended: int = 0
    refused: int = 0
    lost: int = 0
    different: int = 0
    orphans: int = 0
    mistakes: int = 0
    slowest_seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """How much went wrong."""
        return self.lost + self.different + self.orphans + self.mistakes

    def blame(self, what: str, why: str) -> None:
        """Count something that went wrong."""
        setattr(self, what, getattr(self, what) + 1)
        self.said.append(f"{self.kind}: {what}: {why}")


@dataclass
class Trials:
    """Every kind of trial, in a folder of its own.

    Attributes:
        folder: Where runs go; removed run by run.
        chance: All that is random.
    """

    folder: Path
    chance: random.Random
    _whole: dict[str, tuple[Ending, float]] = field(default_factory=dict, init=False)
    _runs: int = field(default=0, init=False)

    # -- a run ---------------------------------------------------------------------------------------

    def whole(self, setup: str) -> tuple[Ending, float]:
        """Return how a run ends that nobody stops, and the seconds that it takes; it is run once."""
        if setup not in self._whole:
            run, started = self._run(setup, 1e6), time.monotonic()
            code = _wait(run.start())
            if code:
                raise RuntimeError(f"the run that nobody stops ended with {code}: {_errors(run)}")
            self._whole[setup] = Ending.of(run.folder), time.monotonic() - started
            self._forget(run)
        return self._whole[setup]

    def new(self) -> tuple[Run, float]:
        """Return a run that has not started, and the seconds that it would take."""
        setup = self.chance.choice(list(SETUPS))
        return self._run(setup, 0.05), self.whole(setup)[1]

    def _run(self, setup: str, checkpoint_seconds: float) -> Run:
        self._runs += 1
        place = self.folder / f"run{self._runs}"
        place.mkdir(parents=True)
        return Run(place / "run", place / "journal", setup, checkpoint_seconds=checkpoint_seconds)

    def _forget(self, run: Run) -> None:
        shutil.rmtree(run.journal.parent)

    def _check_end(self, run: Run, tally: Tally) -> None:
        """Compare a run that has ended with the one that was never stopped."""
        expected, found = self.whole(run.setup)[0], Ending.of(run.folder)
        tally.ended += 1
        if extra := found.files - expected.files:
            tally.blame("orphans", f"{run.folder} still has {', '.join(sorted(extra))}")
        if missing := expected.files - found.files:
            tally.blame("different", f"{run.folder} lacks {', '.join(sorted(missing))}")
        elif found.weights != expected.weights or found.metrics != expected.metrics:
            wrong = [name for name, value in expected.weights.items() if found.weights.get(name) != value]
            tally.blame("different", f"{run.setup}: {', '.join(wrong) or 'metrics'} after {_journal(run)[-400:]!r}")

    def _finish(self, run: Run, tally: Tally) -> None:
        """Let it run to its end."""
        before = _saved_step(run, tally)
        code = _wait(run.start())
        if code:
            tally.blame("mistakes", f"the run that was resumed ended with {code}: {_errors(run)}")
            return
        self._check_went_on(run, before, tally)
        self._check_end(run, tally)

    def _check_went_on(self, run: Run, before: int, tally: Tally) -> None:
        """Look whether the last start went on from the checkpoint, no earlier and no later."""
        steps = _steps_of_last_start(run)
        if steps and steps[0] != before + 1:
            tally.blame("lost", f"the checkpoint was of step {before}, and it went on with step {steps[0]}")
        tally.within += bool(steps) and before % (run.train_images // 8) != 0

    def _moment(self, run: Run, seconds: float) -> Moment:
        """Return a random moment of a run: of all of it, or in two trials of three of its training."""
        if self.chance.random() < 1 / 3:
            return Moment(self.chance.uniform(0.0, seconds))
        return Moment(self.chance.uniform(0.0, 0.6 * seconds), run, len(_journal(run)))

    # -- kinds ---------------------------------------------------------------------------------------

    def kills(self, count: int) -> Iterator[Tally]:
        """SIGKILL at random moments; yields the tally after each."""
        tally, run = Tally("SIGKILL at a random moment"), None
        while tally.trials < count:
            if run is None:
                run, seconds = self.new()
            before = _saved_step(run, tally)
            pid = run.start()
            code = _end_after(pid, self._moment(run, seconds), signal.SIGKILL)
            self._check_went_on(run, before, tally)
            if code == 0:
                self._check_end(run, tally)
                self._forget(run)
                run = None
                continue
            tally.trials += 1
            self._after(run, code, -signal.SIGKILL, tally)
            yield tally
        if run is not None:
            self._finish(run, tally)
            self._forget(run)
        yield tally

    def terms(self, count: int, number: signal.Signals) -> Iterator[Tally]:
        """A signal that asks to stop, at random moments; whatever was done must be there afterwards."""
        tally, run = Tally(f"{number.name} at a random moment"), None
        while tally.trials < count:
            if run is None:
                run, seconds = self.new()
            before = _saved_step(run, tally)
            pid = run.start()
            asked = _Asked()
            code = _end_after(pid, self._moment(run, seconds), number, asked)
            self._check_went_on(run, before, tally)
            if code == 0:
                self._check_end(run, tally)
                self._forget(run)
                run = None
                continue
            tally.trials += 1
            tally.slowest_seconds = max(tally.slowest_seconds, asked.seconds)
            if asked.seconds > LEAVE_SECONDS:
                tally.blame("mistakes", f"it took {asked.seconds:.1f} s to leave")
            steps = _steps_of_last_start(run)
            if code == 128 + number:
                if steps and _saved_step(run, tally) != steps[-1]:
                    tally.blame("lost", f"step {steps[-1]} was done, and step {_saved_step(run, tally)} is kept")
                if number.name not in _errors(run):
                    tally.blame("mistakes", "it left without a word")
            elif steps and not _journal(run).rstrip().endswith("ended 0"):
                tally.blame("mistakes", f"it ended with {code} in the middle of training")
            self._after(run, code, code if code in (128 + number, -number) else MISTAKE, tally)
            yield tally
        if run is not None:
            self._finish(run, tally)
            self._forget(run)
        yield tally

    def pairs(self, count: int) -> Iterator[Tally]:
        """Two processes that resume the same run at once."""
        tally = Tally("two resumers at once")
        while tally.trials < count:
            run, seconds = self.new()
            moment = Moment(self.chance.uniform(0.1, 0.4) * seconds, run)
            if _end_after(run.start(), moment, signal.SIGKILL) == 0:
                self._forget(run)
                continue
            other = replace(run, journal=run.journal.with_name("journal-of-the-other"))
            pids = [run.start()]
            time.sleep(self.chance.uniform(0.0, 0.02))
            pids.append(other.start())
            codes = [_wait(pid) for pid in pids]
            tally.trials += 1
            tally.training += bool(_steps_of_last_start(run)) or bool(_steps_of_last_start(other))
            tally.refused += codes.count(REFUSED)
            if sorted(codes) != [0, REFUSED]:
                tally.blame("mistakes", f"they ended with {codes}: {_errors(run)}{_errors(other)}")
            elif f"in use by process {pids[codes.index(0)]} on " not in _errors(other) + _errors(run):
                tally.blame("mistakes", f"it was not said who holds the folder: {_errors(other)}{_errors(run)}")
            self._check_end(run, tally)
            self._forget(run)
            yield tally

    def full_disks(self, count: int) -> Iterator[Tally]:
        """A disk that fills up at a random moment, and has room again afterwards."""
        kind = "a full disk (a tmpfs of random size)" if _can_mount() else "a file size limit (RLIMIT_FSIZE)"
        tally = Tally(kind)
        while tally.trials < count:
            run, _ = self.new()
            with _small_disk(run, self.chance) as (limited, make_room):
                code = _wait(limited.start())
                if code:
                    tally.trials += 1
                    self._after(limited, code, NO_ROOM if limited.file_bytes is None else REFUSED, tally)
                    make_room()
                    self._finish(replace(limited, file_bytes=None), tally)
            self._forget(run)
            if code:
                yield tally

    def _after(self, run: Run, code: int, expected: int, tally: Tally) -> None:
        """Look at what a process that did not end by itself has left."""
        steps = _steps_of_last_start(run)
        tally.training += bool(steps)
        tally.writing += any(".tmp-" in path.name for path in run.folder.rglob("*")) if run.folder.is_dir() else 0
        if code != expected:
            tally.blame("mistakes", f"it ended with {code}: {_errors(run)[-1500:]}")
        told = [int(line.split()[1]) for line in _lines(run) if line.startswith("saved")]
        if told and _saved_step(run, tally) < told[-1]:
            tally.blame("lost", f"step {told[-1]} was saved, and step {_saved_step(run, tally)} is there")


@dataclass
class _Asked:
    """How long a process took to leave."""

    seconds: float = 0.0


@dataclass
class Moment:
    """When a process is stopped.

    Attributes:
        seconds: So long after its start or, with ``run``, after its first step.
        run: Whose steps.
        seen: Length of the journal before it was started.
    """

    seconds: float
    run: Run | None = None
    seen: int = 0

    def has_begun(self) -> bool:
        """Whether the seconds run."""
        if self.run is not None and "step" in _journal(self.run)[self.seen :]:
            self.run = None
        return self.run is None


def _end_after(pid: int, moment: Moment, number: signal.Signals, asked: _Asked | None = None) -> int:
    """Send a signal at a moment, unless the process ends before; return how it ended."""
    until = float("inf")
    while time.monotonic() < until:
        if until == float("inf") and moment.has_begun():
            until = time.monotonic() + moment.seconds
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, number)
    started = time.monotonic()
    code = _wait(pid)
    if asked is not None:
        asked.seconds = time.monotonic() - started
    return code


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _saved_step(run: Run, tally: Tally) -> int:
    """Return the step of the checkpoint that is there; 0 without one."""
    place = run.folder / "checkpoint"
    if find_checkpoint(place) is None:
        return 0
    try:
        return load_checkpoint(place).step
    except TradyError as error:
        tally.blame("lost", str(error))
        return 0


def _journal(run: Run) -> str:
    try:
        return run.journal.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _lines(run: Run) -> list[str]:
    return _journal(run).splitlines()


def _steps_of_last_start(run: Run) -> list[int]:
    last = _journal(run).rpartition("started")[2]
    return [int(line.split()[1]) for line in last.splitlines() if line.startswith("step")]


def _errors(run: Run) -> str:
    try:
        return Path(f"{run.journal}.errors").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


@contextmanager
def _small_disk(run: Run, chance: random.Random) -> Iterator[tuple[Run, Any]]:
    """Give a run a disk that is too small for it, and a way to make room."""
    if not _can_mount():
        yield replace(run, file_bytes=chance.randrange(512, 24_000)), lambda: None
        return
    disk = run.folder.with_name("disk")
    disk.mkdir()
    pages = chance.randrange(1, 36)
    _mount("-t", "tmpfs", "-o", f"size={4096 * pages}", "trady-reliability", str(disk))
    try:
        room = ["-o", "remount,size=16m", str(disk)]
        yield replace(run, folder=disk / "run"), lambda: _mount(*room)
    finally:
        subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def _can_mount() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
