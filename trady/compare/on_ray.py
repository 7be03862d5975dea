"""Workers of a Ray cluster, which may be many machines.

They write in the same folder as everyone else, so it must lie where all machines see it under one path.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from trady.compare.cell_folder import Outcome
from trady.compare.cells import Job
from trady.compare.devices import cells_at_a_time
from trady.compare.engine import Ended
from trady.compare.execute import Workplace, run_cell
from trady.errors import StateError


class _Worker:
    """What runs in a process of Ray's."""

    def __init__(self, place: Workplace) -> None:
        place.enter()
        self._place = place

    def run(self, job: Job) -> Outcome:
        """Run one cell."""
        return run_cell(job, self._place)


@dataclass(frozen=True)
class _Running:
    job: Job
    actor: Any


class RayEngine:
    """Actors of Ray, each with as many of its processors as torch has threads.

    Args:
        workers: How many; ``None`` is as many as the cluster has processors for.
        place: What each of them is told.
        address: Of the cluster; ``None`` is the one that ``RAY_ADDRESS`` names, or one on this machine.
        gpus_per_cell: Share of a GPU that each actor asks Ray for, which lets it see that one alone; ``None`` asks
            for none.

    Raises:
        StateError: Ray is not installed.
        MatrixError: The cluster has too few GPUs.
    """

    def __init__(
        self, workers: int | None, place: Workplace, address: str | None = None, gpus_per_cell: float | None = None
    ) -> None:
        self._ray = _ray()
        self._mine = not self._ray.is_initialized()
        if self._mine:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            self._ray.init(address=address, log_to_driver=False, include_dashboard=False)
        has = self._ray.cluster_resources()
        wanted = max(1, int(has.get("CPU", 1.0) // place.threads))
        self._limit = workers or wanted
        resources: dict[str, float] = {"num_cpus": place.threads}
        if gpus_per_cell is not None:
            self._limit = cells_at_a_time(has.get("GPU", 0.0), gpus_per_cell, workers, wanted)
            resources["num_gpus"] = gpus_per_cell
        self._make = self._ray.remote(**resources, max_restarts=0)(_Worker).remote
        self._place = place
        self._waiting: list[Any] = []
        self._running: dict[Any, _Running] = {}

    def free(self) -> int:
        """Return how many cells could be started now."""
        return self._limit - len(self._running)

    def start(self, job: Job) -> None:
        """Send a cell to an actor that waits, or to a new one."""
        actor = self._waiting.pop() if self._waiting else self._make(self._place)
        self._running[actor.run.remote(job)] = _Running(job, actor)

    def wait(self, timeout_seconds: float) -> list[Ended]:
        """Return the cells that ended, as soon as there is one."""
        ready, _ = self._ray.wait(list(self._running), timeout=timeout_seconds)
        return [self._collect(answer) for answer in ready]

    def close(self) -> None:
        """Kill the actors: run folders survive that at every instant."""
        for actor in [*self._waiting, *(running.actor for running in self._running.values())]:
            self._ray.kill(actor)
        self._waiting.clear()
        self._running.clear()
        if self._mine:
            self._ray.shutdown()

    def _collect(self, answer: Any) -> Ended:
        running = self._running.pop(answer)
        try:
            outcome = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            return Ended(running.job, None, f"its Ray worker died: {str(error).splitlines()[0]}")
        self._waiting.append(running.actor)
        return Ended(running.job, outcome)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise StateError('--engine ray needs an extra: pip install "trady[ray]"') from None
    return ray
