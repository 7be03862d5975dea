"""Cells in processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from trady.compare.cells import Job
from trady.compare.devices import least_used, seen_by_children
from trady.compare.engine import Ended
from trady.compare.execute import Workplace, run_cell


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    device: str | None = None
    job: Job | None = None


class LocalEngine:
    """Spawned processes, each with its share of the cores and, where there are CUDA devices, with one of them.

    Args:
        workers: How many.
        place: What each of them receives.
        devices: CUDA devices, as ``CUDA_VISIBLE_DEVICES`` names them; each worker sees one, distributed evenly.
    """

    def __init__(self, workers: int, place: Workplace, devices: Sequence[str] = ()) -> None:
        self._place, self._devices = place, devices
        self._limit = workers
        self._workers: list[_Worker] = []

    def free(self) -> int:
        """Return how many cells could be started now."""
        return self._limit - sum(worker.job is not None for worker in self._workers)

    def start(self, job: Job) -> None:
        """Send a cell to an idle worker, or to a new one."""
        waiting = [worker for worker in self._workers if worker.job is None]
        worker = waiting[0] if waiting else self._hire()
        worker.job = job
        with contextlib.suppress(OSError):  # it died while it was idle: wait() reports that
            worker.pipe.send(job)

    def wait(self, timeout_seconds: float) -> list[Ended]:
        """Return the cells that ended, as soon as there is one."""
        busy = [worker for worker in self._workers if worker.job is not None]
        ready = set(wait([worker.pipe for worker in busy], timeout_seconds))
        return [self._collect(worker) for worker in busy if worker.pipe in ready]

    def close(self) -> None:
        """Kill the workers: run folders survive that at every instant."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._place), daemon=True)
        device = least_used(self._devices, [worker.device for worker in self._workers])
        with seen_by_children(device):
            process.start()
        theirs.close()  # so that the pipe ends when the worker does
        worker = _Worker(process, ours, device)
        self._workers.append(worker)
        return worker

    def _collect(self, worker: _Worker) -> Ended:
        job, worker.job = worker.job, None
        assert job is not None
        try:
            return Ended(job, worker.pipe.recv())
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            worker.pipe.close()
            return Ended(job, None, _death(worker.process.exitcode))


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    hint = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-code).name}{hint}"


def _work(pipe: Connection, place: Workplace) -> None:
    """Run cells until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place.enter()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(run_cell(job, place))


def _end_with_parent() -> None:
    """Exit as soon as the parent is gone, so that the folder does not stay locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
