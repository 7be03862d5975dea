"""One workload under one setting of the allocator, in a process of its own: growth of the process over the ledger.

``python -m benchmarks.process.growth WORKLOAD KIB`` prints one line of JSON. 0 KiB leaves glibc as it is.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.methods import trady_step
from benchmarks.workloads import WORKLOADS
from trady.process.allocator import return_freed_memory, trim
from trady.process.ready import make_ready
from trady.process.resident import Resident, reset_peak, resident

#: Steps that are watched, and as many seconds of processor time that at most go into timing more.
_STEPS, _SECONDS = 4, 2.0


@dataclass(frozen=True)
class Growth:
    """What a process takes for the steps of a workload.

    Attributes:
        workload: Its name.
        threshold_kib: From this size on freed memory goes back to the kernel; 0 is glibc's own way.
        once_bytes: Resident after the first step over before the tuner was made, and never given back: plans, kernels.
        growth_bytes: The most that was resident during later steps, over what is resident between them.
        ledger_bytes: The ledger's peak without weights and batch, which lie there between steps too.
        cpu_seconds: Processor time of a step.
    """

    workload: str
    threshold_kib: int
    once_bytes: int
    growth_bytes: int
    ledger_bytes: int
    cpu_seconds: float

    @property
    def ratio(self) -> float:
        """Growth of the process over the ledger's peak."""
        return self.growth_bytes / self.ledger_bytes


def measure(name: str, threshold_kib: int, models: Path) -> Growth:
    """Measure in this process; its allocator's settings stay."""
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    if threshold_kib:
        make_ready()
        return_freed_memory(threshold_kib << 10)
    task = workload.make(models)
    before = _settled()
    with trady_step(workload, task) as step:
        step.run()
        between = _settled()
        reset_peak()
        for _ in range(_STEPS):
            step.run()
        highest = _now().peak_bytes
        started, steps = time.process_time(), 0
        while steps < 3 or time.process_time() - started < _SECONDS:
            step.run()
            steps += 1
        seconds = (time.process_time() - started) / steps
        highest = max(highest, _now().peak_bytes)
        # While a ranking is learnt, every second step draws other channels: as many draws as the process has seen.
        ledger = max(step.ledger().working_peak_bytes for _ in range(_STEPS * 4))
    once, growth = between - before, highest - between
    return Growth(name, threshold_kib, once, growth, ledger, seconds)


def _now() -> Resident:
    now = resident()
    assert now is not None, "this system does not say what a process has in memory"
    return now


def _settled() -> int:
    gc.collect()
    trim()
    return _now().resident_bytes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))) + "\n")
