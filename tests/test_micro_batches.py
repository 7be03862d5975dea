"""A step on parts of a batch: the same update as on the whole batch, in less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import trady
from tests.small_task import SmallNet, StopAfter, small_data, small_net
from trady.errors import BudgetError, ModelError, TrainingError
from trady.model.batch import Batch
from trady.planning.micro_batch import check_micro_batch, chunk_sizes
from trady.training.run import finetune


def without_dropout(classes: int = 3) -> SmallNet:
    model = small_net(classes)
    assert isinstance(model, SmallNet)
    model.dropout.p = 0.0
    return model


def run(out: Path | None, **options: Any) -> Any:
    settings: dict[str, Any] = {"budget": "update:12 KiB", "epochs": 2, "batch_size": 16, "lr": 0.05, **options}
    settings.setdefault("progress", False)
    model = settings.pop("model", None) or without_dropout()
    return finetune(model, small_data(48, 0), small_data(24, 1), out=out, **settings)


@given(samples=st.integers(1, 40), size=st.integers(1, 50), mapping=st.booleans())
def test_the_parts_of_a_batch_are_the_batch(samples: int, size: int, mapping: bool) -> None:
    tensors = (torch.arange(samples * 2).view(samples, 2), torch.arange(samples))
    batch: Any = {"ids": tensors[0], "labels": tensors[1], "flag": True} if mapping else tensors
    parts = [(chunk.inputs, share) for chunk, share in Batch.of(batch).chunks(size)]
    assert sum(share for _, share in parts) == pytest.approx(1)
    for key in ("ids", "labels") if mapping else (0, 1):
        assert torch.equal(torch.cat([part[key] for part, _ in parts]), batch[key])
        assert all(len(part[key]) <= size for part, _ in parts)
    first = Batch.of(batch).chunk(0, 1)
    assert Batch.of(batch).nbytes - first.nbytes == (samples - 1) * 24


def test_auto_halves_down_to_one_sample() -> None:
    assert chunk_sizes(Batch.of(torch.zeros(20, 3)), "auto") == (20, 10, 5, 3, 2, 1)
    assert chunk_sizes(Batch.of(torch.zeros(20, 3)), 64) == (20,)
    for wrong in (0, -1, True, 1.5, "some"):
        with pytest.raises(BudgetError, match="micro_batch"):
            check_micro_batch(wrong)


@pytest.mark.parametrize("policy", ["trady", "head", "full"])
@pytest.mark.parametrize("micro_batch", [8, 5])
def test_parts_of_a_batch_train_as_the_whole_batch_does(policy: str, micro_batch: int) -> None:
    whole, parts = (run(None, policy=policy, micro_batch=size, budget="elements:2000") for size in (None, micro_batch))
    for a, b in zip(whole.history, parts.history, strict=True):
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-5)
        assert (a.micro_batch, b.micro_batch) == (None, micro_batch)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-5), name


def test_accumulated_gradients_of_the_channels_are_those_of_the_whole_batch() -> None:
    images, labels = small_data(16, 0).batch(range(16))
    gradients = []
    for size in (None, 4):
        tuner = trady.prepare(without_dropout(), images, budget="elements:2000", micro_batch=size)
        for chunk, share in Batch.of((images, labels)).chunks(size):
            x, y = chunk.inputs
            (F.cross_entropy(tuner.model(x), y) * share).backward()
        gradients.append([p.grad for p in tuner.parameters()])
        tuner.finish()
    for whole, parts in zip(*gradients, strict=True):
        assert (whole is None) == (parts is None)
        assert whole is None or parts.allclose(whole, atol=1e-6)


def test_a_micro_batch_stays_in_a_budget_that_the_whole_batch_does_not_fit_in(tmp_path: Path) -> None:
    budget = "150 KiB"
    with pytest.raises(BudgetError, match="below the minimum") as refused:
        run(None, budget=budget)
    assert "with 8 samples a step" in str(refused.value)
    result = run(tmp_path, budget=budget, micro_batch="auto")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["micro_batch"] == 8
    assert plan["predicted_parts"]["inputs"] == 16 * 3 * 12 * 12 * 4
    assert all(epoch.micro_batch == 8 for epoch in result.history)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["micro_batch"] == "auto"
    assert result.peak_bytes <= trady.parse_budget(budget).amount
    assert result.peak_bytes == pytest.approx(plan["predicted_peak_bytes"], rel=0.03)


def test_auto_takes_the_whole_batch_where_it_fits() -> None:
    assert run(None, micro_batch="auto", budget="2 MiB").history[0].micro_batch is None


def test_auto_leaves_room_for_the_state_of_the_optimizer() -> None:
    least = None
    for size in (16, 8):
        tuner = trady.prepare(without_dropout(), torch.zeros(16, 3, 12, 12), budget="1 MiB", micro_batch=size)
        least = least or tuner.plan.least_peak_bytes
        tuner.finish()
    assert least is not None
    plain = run(None, budget=least, micro_batch="auto", epochs=1)
    adam = run(None, budget=least, micro_batch="auto", epochs=1, optimizer="adamw", lr=0.01)
    assert plain.history[0].micro_batch is None
    assert adam.history[0].micro_batch == 8  # the state would not fit beside the whole batch
    assert adam.peak_bytes <= least


@pytest.mark.parametrize("policy", ["trady", "full"])
def test_a_resumed_run_on_parts_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path: Path, policy: str) -> None:
    settings = {"policy": policy, "epochs": 3, "micro_batch": 5, "model": None, "momentum": 0.9}
    run(tmp_path / "unbroken", **settings)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", progress=StopAfter(1), **settings)
    with pytest.raises(trady.CheckpointError, match="micro_batch was 5, is now 4"):
        run(tmp_path / "broken", resume=True, **{**settings, "micro_batch": 4})
    with pytest.raises(trady.CheckpointError, match="recompute was 'auto', is now 'none'"):
        run(tmp_path / "broken", resume=True, recompute="none", **settings)
    run(tmp_path / "broken", resume=True, **settings)
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "broken")]
    assert ends[0] == ends[1]


def test_what_cannot_be_done_in_parts_is_refused() -> None:
    for name in ("sgd", "adamw"):
        with pytest.raises(TrainingError, match=f"every backward pass.*take {name}"):
            run(None, optimizer=f"{name}-in-backward", micro_batch=8)
    for wrong in (0, "some", True, 2.0):
        with pytest.raises(BudgetError, match="neither a number of samples nor auto"):
            run(None, micro_batch=wrong)
    model = without_dropout()
    model.features[1] = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ModelError, match=r"features\.1 normalises with the statistics of the batch"):
        run(None, model=model, policy="full", micro_batch=8)
    with pytest.raises(BudgetError, match="recompute='some' is not known"):
        run(None, recompute="some")


def test_most_takes_smaller_chunks_while_more_trains_with_them() -> None:
    images = torch.zeros(16, 3, 12, 12)

    def planned(micro_batch: int | str, budget: str) -> trady.Plan:
        return trady.plan(without_dropout(), images, budget=budget, micro_batch=micro_batch)

    def trains(micro_batch: int | str, budget: str) -> int:
        plan = planned(micro_batch, budget)
        return plan.table.weight_elements(plan.selection)

    tight = "150 KiB"
    most, auto = planned("most", tight), planned("auto", tight)
    assert auto.micro_batch == 8
    assert most.micro_batch is not None
    assert most.micro_batch < 8
    assert trains("most", tight) > trains("auto", tight)
    best = max(trains(size, tight) for size in (8, 4, 2, 1))
    assert trains("most", tight) >= 0.95 * best
    larger = 2 * most.micro_batch
    assert trains(larger, tight) < 0.95 * best  # else the larger one would have been taken, which is faster
    assert (most.predicted_peak_bytes or 0) <= trady.parse_budget(tight).amount


def test_most_takes_the_whole_batch_where_all_that_can_train_does() -> None:
    images = torch.zeros(16, 3, 12, 12)
    for budget in ("4 MiB", "elements:2000"):
        assert trady.plan(without_dropout(), images, budget=budget, micro_batch="most").micro_batch is None


def test_a_run_with_most_stays_in_its_budget(tmp_path: Path) -> None:
    result = run(tmp_path, budget="150 KiB", micro_batch="most", optimizer="adamw", lr=0.01)
    assert result.peak_bytes <= trady.parse_budget("150 KiB").amount
    assert result.history[-1].micro_batch == json.loads((tmp_path / "plan.json").read_text())["micro_batch"]
