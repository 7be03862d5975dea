"""Are the peaks on the GPU those of the plan?"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import trady
from benchmarks.gpu.where import Figures, Where, allocator_peak, forget
from benchmarks.methods import RATE
from benchmarks.prediction import least
from benchmarks.workloads import Workload
from trady.planning.scopes import PEAK

#: Budgets between these factors of the least possible one, at which only the head trains, if there is one.
BUDGETS, LOWEST, HIGHEST = 10, 1.02, 3.0

#: From this budget on, weights and images are in bf16.
IN_BF16 = 7


def peaks(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Run a step under ``peak:`` budgets; report what was predicted and what it took by both counts.

    ``allocator`` has weights and batch in it, like the two others, and besides the workspaces of cuBLAS and cuDNN
    and the allocator's rounding to 512 bytes. ``before`` is what it had given out when the step began.
    """
    workload, in_bf16 = where.workload(item), where.workload(item, torch.bfloat16)
    chance = random.Random(0)
    lowest = least(workload.make(where.models), PEAK, "sgd")
    found: Figures = {"least_bytes": lowest, "steps": []}
    for index in range(BUDGETS):
        if where.seconds_left < 0:
            break
        budget = round(lowest * LOWEST * (HIGHEST / LOWEST) ** (chance.random() if index else 0))
        for recompute in ("auto", "none")[: 1 + (index == 0)]:
            forget(where.device)
            try:
                step = _step(in_bf16 if index >= IN_BF16 else workload, where, budget, recompute)
                dtype = "bf16" if index >= IN_BF16 else "float32"
                found["steps"].append({"recompute": recompute, "dtype": dtype, **step})
            except trady.BudgetError:
                continue  # without recomputation the least is more
            write(found)


def _step(workload: Workload, where: Where, budget: int, recompute: str) -> dict[str, Any]:
    task = workload.make(where.models)
    tuner = trady.prepare(task.model, task.batch, budget=f"peak:{budget} B", ranking="online", recompute=recompute)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=RATE))

    def step() -> None:
        task.run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        step()
        forget(where.device)
        before = torch.cuda.memory_allocated(where.device) if where.on_cuda else None
        allocator = allocator_peak(step, where.device)
        ledger = tuner.ledger(step, inference=False)
        return {
            "budget": budget,
            "predicted": tuner.plan.predicted_peak_bytes,
            "parts": dict(tuner.plan.predicted_parts),
            "ledger": ledger.peak_bytes,
            "weights": ledger.weight_bytes,
            "before": before,
            "allocator": allocator,
        }
    finally:
        tuner.finish()
