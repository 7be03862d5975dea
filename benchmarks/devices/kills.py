"""One process of several is killed at a random moment; the others have to end, and 1, 2 and 4 processes to go on.

A run is the same training in any number of processes: a step has the same samples, and nothing in it takes random
numbers of its own process. So what goes on in another number has to end where a run that nobody stopped does, but for
the order of sums. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist

from benchmarks.reliability.task import MISTAKE, REFUSED, Journal, Network, images
from trady.errors import TradyError
from trady.training.checkpoint import find_checkpoint, load_checkpoint
from trady.training.progress import Silent
from trady.training.run import finetune

#: How long the other processes may take to end, in training. One that plans ends at its next collective.
LEAVE_SECONDS = 10.0
#: How far a loss of an epoch may be off, relative: float32, in another order of sums.
LOSS_BAR = 1e-4
#: In which numbers of processes a run is started and killed, and goes on.
STARTED, GOES_ON = (2, 4), (1, 2, 4)

#: Samples of a step, all processes together.
SAMPLES = 16
IMAGES, EPOCHS, CHECKPOINT_SECONDS = 96, 3, 0.05
#: A run of two minutes hangs.
_HANGS_SECONDS = 120.0

SETUPS: Mapping[str, Mapping[str, Any]] = {
    "trady, ranking learnt, AdamW": {
        "budget": "elements:900", "policy": "trady", "ranking": "online", "optimizer": "adamw", "lr": 0.01,
    },
    "velocity, measured in each epoch, SGD with momentum, 3 draws": {
        "budget": "elements:900", "policy": "velocity", "momentum": 0.9, "lr": 0.05, "draws_per_epoch": 3,
        "observed_batches": 2,
    },
    "full, SGD with momentum": {"policy": "full", "momentum": 0.9, "lr": 0.05},
}  # fmt: skip


def warm_up() -> None:
    """Import and compile all that a run needs, in the process that the others are forked from."""
    for setup in SETUPS:
        _train(setup, None, 1, 1, Silent())


def _train(setup: str, out: Path | None, processes: int, epochs: int, display: Silent) -> None:
    torch.manual_seed(0)
    finetune(
        Network(), images(IMAGES, 0), images(48, 1), epochs=epochs, out=out, batch_size=SAMPLES // processes,
        resume=out is not None, seed=5, mode="eval", checkpoint_every=CHECKPOINT_SECONDS, progress=display,
        **SETUPS[setup],
    )  # fmt: skip


@dataclass
class Ranks:
    """The processes of one start of a run.

    Attributes:
        folder: The run folder; journals and errors are beside it.
        setup: What it trains.
        count: How many processes.
        name: Of this start.
    """

    folder: Path
    setup: str
    count: int
    name: str
    pids: list[int] = field(default_factory=list)

    def start(self) -> Ranks:
        """Fork them."""
        for rank in range(self.count):
            pid = os.fork()
            if not pid:
                code = MISTAKE
                try:
                    code = self._work(rank)
                finally:
                    os._exit(code)
            self.pids.append(pid)
        return self

    def journal(self, rank: int) -> Path:
        """What a process has written down: steps, and checkpoints that were complete."""
        return self.folder.with_name(f"{self.name}-journal-{rank}")

    def said(self, rank: int) -> str:
        """What a process has said in the end."""
        path = Path(f"{self.journal(rank)}.errors")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def steps(self, rank: int = 0) -> list[int]:
        """The steps that a process has done."""
        return self._noted("step", rank)

    def saved(self) -> list[int]:
        """The steps of the checkpoints that were complete."""
        return self._noted("saved", 0)

    def has_joined(self) -> bool:
        """Whether all processes have found each other."""
        return all(self._noted("joined", rank) for rank in range(self.count))

    def _noted(self, what: str, rank: int) -> list[int]:
        path = self.journal(rank)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(what)]

    def _work(self, rank: int) -> int:
        os.dup2(os.open(f"{self.journal(rank)}.errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.count))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(LOCAL_WORLD_SIZE=str(self.count), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        AcceleratorState._reset_state(reset_partial_state=True)  # it knows of one process: the one that was forked
        try:
            if self.count > 1:
                store = f"file://{self.folder.with_name(self.name)}-store"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=self.count)
            with Journal(self.journal(rank), IMAGES // SAMPLES).watching() as journal:
                journal.note("joined 1")
                _train(self.setup, self.folder, self.count, EPOCHS, journal)
            if self.count > 1:
                dist.destroy_process_group()
        except TradyError as error:
            os.write(2, f"{error}\n".encode())
            return REFUSED
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            return MISTAKE
        return 0

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Wait until the processes have got so far, or have hung."""
        started = time.monotonic()
        while not there() and time.monotonic() - started < _HANGS_SECONDS:
            time.sleep(0.002)

    def wait(self) -> tuple[list[int], float]:
        """Wait until all have ended; return how each did, and the seconds that it took. Who hangs is killed."""
        started, codes = time.monotonic(), dict.fromkeys(self.pids, 0)
        left = list(self.pids)
        while left:
            for pid in list(left):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    left.remove(pid)
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() - started > _HANGS_SECONDS:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return list(codes.values()), time.monotonic() - started


@dataclass
class Found:
    """What came of the kills.

    Attributes:
        kills: How many.
        training: How many met all processes after their first step.
        within: How many left a checkpoint of the middle of an epoch.
        reasons: Processes that ended because another one had, and said so.
        slowest_seconds: Longest time from a kill in training to the end of the last of the others.
        slowest_planning_seconds: The same of a kill before their first step.
        went_on: Runs that ended, by the number of processes that they went on in.
        loss_error: The largest relative difference of the loss of an epoch.
        wrong: What went wrong, in words.
    """

    kills: int = 0
    training: int = 0
    within: int = 0
    reasons: int = 0
    slowest_seconds: float = 0.0
    slowest_planning_seconds: float = 0.0
    went_on: dict[int, int] = field(default_factory=lambda: dict.fromkeys(GOES_ON, 0))
    loss_error: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return asdict(self)


@dataclass
class Campaign:
    """Kills at random moments.

    Attributes:
        folder: Where runs go.
        chance: All that is random.
    """

    folder: Path
    chance: random.Random
    found: Found = field(default_factory=Found)
    _whole: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _seconds: dict[tuple[str, int], float] = field(default_factory=dict)

    def run(self, kills: int) -> Iterator[Found]:
        """Kill; yields what was found after each."""
        number = 0
        while self.found.kills < kills:
            number += 1
            setup, count = self.chance.choice(list(SETUPS)), STARTED[number % len(STARTED)]
            place = self.folder / f"kill{number}"
            place.mkdir()
            if self._kill(place, setup, self.duration(setup, count), count):
                self.found.kills += 1
                for others in GOES_ON:
                    self._go_on(place, setup, others)
                yield self.found  # complete: every run has gone on
            shutil.rmtree(place)

    def whole(self, setup: str) -> list[dict[str, Any]]:
        """Return the metrics of a run of two processes that nobody stops."""
        self.duration(setup, 2)
        return self._whole[setup]

    def duration(self, setup: str, count: int) -> float:
        """Return the seconds from the first step of a run to its end, in so many processes."""
        if (setup, count) not in self._seconds:
            place = self.folder / f"whole{len(self._seconds)}"
            place.mkdir()
            ranks = Ranks(place / "run", setup, count, "whole").start()
            ranks.wait_for(lambda: bool(ranks.steps()))
            codes, seconds = ranks.wait()
            if any(codes):
                raise RuntimeError(f"the run that nobody stops ended with {codes}: {ranks.said(0)}")
            self._seconds[setup, count] = seconds
            if count == 2:
                self._whole[setup] = _metrics(place / "run")
        return self._seconds[setup, count]

    def _kill(self, place: Path, setup: str, seconds: float, count: int) -> bool:
        """Kill a process of a run; return whether it was still there."""
        ranks, found = Ranks(place / "run", setup, count, "killed").start(), self.found
        planning = self.chance.random() < 1 / 4
        ranks.wait_for(ranks.has_joined if planning else lambda: bool(ranks.steps()))
        time.sleep(self.chance.uniform(0.0, 0.9 * seconds))
        victim = self.chance.randrange(count)
        trains = all(ranks.steps(rank) for rank in range(count))
        os.kill(ranks.pids[victim], signal.SIGKILL)
        codes, took = ranks.wait()
        if codes[victim] != -signal.SIGKILL:  # it had ended
            return False
        if not trains:
            found.slowest_planning_seconds = max(found.slowest_planning_seconds, took)
        else:
            found.slowest_seconds = max(found.slowest_seconds, took)
        if trains and took > LEAVE_SECONDS:
            found.wrong.append(f"{setup}, {count} processes: the others took {took:.1f} s to end")
        for rank, code in enumerate(codes):
            if rank == victim:
                continue
            if code == REFUSED and "another process of this run has ended or does not answer" in ranks.said(rank):
                found.reasons += 1
            elif code or len(ranks.steps(rank)) < EPOCHS * IMAGES // SAMPLES:
                found.wrong.append(f"{setup}, {count} processes: rank {rank} ended with {code}: {ranks.said(rank)}")
        found.training += trains
        step = _saved_step(place / "run", found)
        found.within += step % (IMAGES // SAMPLES) != 0
        if step < max(ranks.saved(), default=0):
            found.wrong.append(f"{setup}: step {max(ranks.saved())} was saved, and step {step} is there")
        return True

    def _go_on(self, place: Path, setup: str, count: int) -> None:
        """Let a copy of what is left go on to its end."""
        folder, found = place / f"in-{count}", self.found
        if (place / "run").is_dir():
            shutil.copytree(place / "run", folder)
        before = _saved_step(folder, found)
        ranks = Ranks(folder, setup, count, f"goes-on-in-{count}").start()
        codes, _ = ranks.wait()
        named = f"{setup}, killed at step {before} and resumed in {count}"
        if any(codes):
            found.wrong.append(f"{named}: they ended with {codes}: {[ranks.said(rank) for rank in range(count)]}")
            return
        steps = ranks.steps()
        if steps and steps[0] != before + 1:
            found.wrong.append(f"{named}: went on with step {steps[0]}")
        if left := [path for path in folder.rglob("*") if ".tmp-" in path.name]:
            found.wrong.append(f"{named}: {left} is left")
        expected, metrics = self.whole(setup), _metrics(folder)
        for name in ("epoch", "step", "lr", "selection_hash"):
            if [each[name] for each in metrics] != [each[name] for each in expected]:
                found.wrong.append(f"{named}: {name} is {[each[name] for each in metrics]}")
        for name in ("train_loss", "evaluation_loss"):
            errors = [abs(e[name] - m[name]) / abs(e[name]) for e, m in zip(expected, metrics, strict=False)]
            found.loss_error = max(found.loss_error, *errors)
            if max(errors) > LOSS_BAR:
                found.wrong.append(f"{named}: {name} is {max(errors):.1e} off")
        found.went_on[count] += 1


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _saved_step(folder: Path, found: Found) -> int:
    """Return the step of the checkpoint that is there; 0 without one."""
    if find_checkpoint(folder / "checkpoint") is None:
        return 0
    try:
        return load_checkpoint(folder / "checkpoint").step
    except TradyError as error:
        found.wrong.append(str(error))
        return 0
