"""Runs of the small task, and what they have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.small_task import small_data, small_net
from trady.training.run import finetune

BUDGET = "update:12 KiB"


def run(out: Path | None, **options: Any) -> Any:
    settings: dict[str, Any] = {"budget": BUDGET, "epochs": 3, "batch_size": 8, "lr": 0.05, **options}
    model = settings.pop("model", None) or small_net()
    train, evaluation = settings.pop("data", None) or (small_data(48, 0), small_data(24, 1))
    return finetune(model, train, evaluation, out=out, progress=settings.pop("progress", False), **settings)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


#: What is of the process that runs, not of the run.
OF_THE_PROCESS = {"seconds", "samples_per_second", "observing_seconds", "process_bytes", "process_peak_bytes"}


def without_clock(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k not in OF_THE_PROCESS} for m in metrics]
