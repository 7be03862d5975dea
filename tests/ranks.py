"""Several processes of gloo, one thread each, that run the same functions one after the other."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

#: Called with (rank, processes); what it returns is kept, and so is the text of what it raises.
Scenario = Callable[[int, int], Any]


def together(scenarios: Mapping[str, Scenario], folder: Path, processes: int = 2) -> dict[str, list[Any]]:
    """Run scenarios in processes that see each other; return what each of them gave, by scenario, by rank."""
    spawn(_rank, (processes, str(folder), dict(scenarios)), nprocs=processes)
    told = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    return {name: [each[name] for each in told] for name in scenarios}


def _rank(rank: int, processes: int, folder: str, scenarios: Mapping[str, Scenario]) -> None:
    torch.set_num_threads(1)
    # As torchrun sets them: libraries ask for them.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    store = f"file://{folder}/store"
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=timeout)
    told: dict[str, Any] = {}
    try:
        for name, scenario in scenarios.items():
            try:
                told[name] = scenario(rank, processes)
            except Exception as error:  # said in the test that asks for it
                told[name] = Raised(type(error).__name__, str(error), traceback.format_exc())
        torch.save(told, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


class Raised:
    """What a scenario has raised."""

    def __init__(self, kind: str, text: str, trace: str) -> None:
        self.kind, self.text, self.trace = kind, text, trace

    def __repr__(self) -> str:
        return self.trace
