"""A whole run of a workload in a process budget, in a process of its own.

``python -m benchmarks.process.training WORKLOAD BUDGET MODELS`` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import trady
from benchmarks.tasks import CrossEntropy, Task
from benchmarks.workloads import WORKLOADS
from trady.planning.budget import InfeasibleBudgetError, parse_budget
from trady.planning.process_memory import ready_for
from trady.process.resident import resident

#: Batches of an epoch.
_BATCHES = 2


@dataclass(frozen=True)
class Trained:
    """A run in a process budget, from its data to its files.

    Attributes:
        workload: Its name.
        budget: As text.
        minimum_bytes: The minimum budget, where this one is below it; all else is 0 then.
        predicted_bytes: The peak of the process that the plan has told.
        measured_bytes: What it was.
        channels: Channels that were trained.
        file_bytes: Pages of files in ``measured_bytes``: the code of Python and PyTorch.
    """

    workload: str
    budget: str
    minimum_bytes: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    channels: int = 0
    file_bytes: int = 0


class _Samples(Dataset[Any]):
    """The samples of one batch, again and again, so that data takes no memory beside the batch."""

    def __init__(self, task: Task) -> None:
        assert isinstance(task.loss, CrossEntropy)
        self.batch, self.labels = task.batch, task.loss.labels

    def __len__(self) -> int:
        return _BATCHES * len(self.labels)

    def __getitem__(self, index: int) -> Any:
        at = index % len(self.labels)
        if isinstance(self.batch, Mapping):
            return {name: self._at(value, at) for name, value in self.batch.items()} | {"labels": self.labels[at]}
        return self._at(self.batch, at), int(self.labels[at])

    def _at(self, value: Tensor, at: int) -> Tensor:
        return value[at]


def train(name: str, budget: str, models: Path) -> Trained:
    """Train an epoch in this process, in a budget."""
    torch.set_num_threads(1)
    ready_for(parse_budget(budget))
    task = WORKLOADS[name].make(models)
    samples = _Samples(task)
    # Some workloads run a pass of their own to make their statistics: what that took is no part of the run.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        try:
            result = trady.finetune(
                task.model,
                samples,
                samples,
                budget=budget,
                epochs=1,
                out=out,
                batch_size=len(samples.labels),
                lr=1e-3,
                progress=False,
            )
        except InfeasibleBudgetError as error:
            return Trained(name, budget, error.least_amount)
        plan = json.loads((out / "plan.json").read_text())
    now = resident()
    assert now is not None
    return Trained(
        name,
        budget,
        predicted_bytes=plan["predicted_process_bytes"],
        measured_bytes=result.process_peak_bytes or 0,
        channels=result.history[-1].channels,
        file_bytes=now.resident_bytes - now.anonymous_bytes,
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(train(sys.argv[1], sys.argv[2], Path(sys.argv[3])))) + "\n")
