"""What the processes of a training send each other, told beforehand: ``trady plan --ranks``, ``benchmarks.scale``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import trady
from benchmarks.scale import extended, row_of
from tests.small_task import small_net
from trady.cli.app import app
from trady.errors import BudgetError
from trady.estimates.report import MethodFit
from trady.planning.forecast import forecast
from trady.planning.request import Request
from trady.planning.traffic import in_a_ring
from trady.process.ranks import BUFFER_BYTES, _buckets, traffic_of

IMAGES = torch.randn(4, 3, 12, 12)
REQUEST = Request(budget="update:20 KiB", ranking="structural", seed=3)


def test_what_a_step_averages_is_what_trains_and_whether_it_is_there() -> None:
    found = forecast(small_net(), IMAGES, replace(REQUEST, ranks=4)).traffic
    assert found is not None
    tuner = trady.prepare(small_net(), IMAGES, budget="update:20 KiB", ranking="structural", seed=3)
    assert found.averaged_bytes == sum(p.nbytes + 4 for p in tuner.parameters() if p.numel())
    tuner.finish()
    assert found.calls == 1
    assert found.sent_bytes == found.averaged_bytes * 6 // 4
    assert found.full_bytes == sum(p.nbytes for p in small_net().parameters())


def test_one_process_sends_nothing_and_several_need_buffers() -> None:
    alone = forecast(small_net(), IMAGES, replace(REQUEST, recompute="all"))
    several = forecast(small_net(), IMAGES, replace(REQUEST, recompute="all", ranks=2))
    assert alone.traffic is None
    assert "traffic" not in alone.to_json()
    assert several.plan.predicted_peak_bytes >= alone.plan.predicted_peak_bytes  # type: ignore[operator]
    assert several.least_budget_bytes >= alone.least_budget_bytes
    with pytest.raises(BudgetError, match="ranks is 0"):
        Request(ranks=0)


def test_the_command_says_it(tmp_path: Path) -> None:
    asked = [
        "plan",
        "tests.small_task:small_net",
        "--image-size",
        "12",
        "--batch-size",
        "4",
        "--budget",
        "update:20 KiB",
    ]

    def said(*more: str) -> str:
        result = CliRunner().invoke(app, [*asked, *more], env={"COLUMNS": "120", "NO_COLOR": "1"})
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    found = json.loads(said("--ranks", "8", "--json"))["traffic"]
    assert found["ranks"] == 8
    assert 0 < found["sent_bytes"] < found["full_sent_bytes"]
    assert "each of 8 processes has the whole model" in " ".join(said("--ranks", "8").split())
    assert "processes" not in said()


def test_collectives_are_told_as_they_are_made() -> None:
    elements = [100, BUFFER_BYTES // 4 - 90, 20, 0, BUFFER_BYTES, 3, 7]
    tensors = [torch.empty(n, dtype=(torch.float32, torch.float16)[i % 2]) for i, n in enumerate(elements)]
    buckets = list(_buckets(tensors))
    told = traffic_of([(tensor.dtype, tensor.nbytes) for tensor in tensors])
    assert (told.calls, told.nbytes) == (len(buckets), sum(tensor.nbytes for tensor in tensors))
    assert len(buckets) > 2


def _fit(trained: int, **parts: int) -> MethodFit:
    return MethodFit("x", "x", trainable_parameters=trained, peak_bytes=sum(parts.values()), parts=parts)


def test_blocks_add_what_the_last_ones_added() -> None:
    two: Any = _fit(10, weights=100, temporaries=7)
    four: Any = _fit(20, weights=180, temporaries=7)
    assert extended(two, four, 4) == (20, {"weights": 180, "temporaries": 7})
    assert extended(two, four, 80) == (400, {"weights": 3220, "temporaries": 7})


def test_sharded_weights_are_gathered_twice_and_their_gradients_summed_up_once() -> None:
    parts = {"weights": 6400, "gradients": 6400, "optimizer state": 12800, "temporaries": 5}
    full = row_of("full + checkpointing", 3200, parts, 6400, 64, 80, rest=9)
    assert full.peak_bytes == 25605
    assert full.sharded_bytes == 9 + 25600 // 64 + 240
    assert full.sent_bytes == in_a_ring(6400, 64) == 2 * 63 * 100
    assert full.sharded_sent_bytes == 3 * 6300
    few = row_of("TraDy", 32, parts, 6400, 64, 80)
    assert few.sharded_bytes == 5 + 25600 // 64 + 160
    assert (few.sent_bytes, few.sharded_sent_bytes) == (126, 2 * 6300 + 126)
    assert row_of("LoRA", 32, parts, 6400, 64, 80).sent_bytes == 2 * 126
