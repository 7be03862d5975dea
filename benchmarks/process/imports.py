"""Resident memory after imports, the first plan and the first step, in a process of its own.

``python -m benchmarks.process.imports before`` lets PyTorch import as it does; ``after`` lets its compiler wait.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

STATES = ("python", "import torch", "import trady", "first plan", "first optimizer", "first step")


def measure(how: str) -> dict[str, int]:
    """Return resident bytes after each of :data:`STATES`."""
    found: dict[str, int] = {}

    def note(state: str) -> None:  # not with trady.process: nothing of trady is imported yet
        match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None, "this system does not say what a process has in memory"
        found[state] = int(match[1]) << 10

    note("python")
    import torch
    from torch import nn

    note("import torch")
    import trady
    import trady.training.run
    from trady.process.compiler import wait_for_compiler

    note("import trady")
    if how == "after":
        wait_for_compiler()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    batch = torch.zeros(8, 3, 32, 32)
    trady.plan(model, batch, budget="10 MiB")
    note("first plan")
    tuner = trady.prepare(model, batch, budget="10 MiB")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    note("first optimizer")
    model(batch).sum().backward()
    optimizer.step()
    note("first step")
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"how": sys.argv[1], **measure(sys.argv[1])}) + "\n")
