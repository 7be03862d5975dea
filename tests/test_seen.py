"""What a loop was seen to do goes through a checkpoint: a resumed loop ends bit for bit where it would have."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.loops import Text, convolutions, ids, images, minimum
from tests.models import same, snapshot
from trady.errors import CheckpointError, TradyWarning


@pytest.fixture(autouse=True)
def _adapts() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TradyWarning)
        yield


def through_a_file(*states: Any) -> list[Any]:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return list(torch.load(file))


def batch_of(kind: str, step: int) -> Tensor:
    """Three steps as planned, then larger ones, then small ones again."""
    length = (0, 0, 0, 1, 1, 2, 0, 0)[step]
    if kind == "text":
        return ids(*((16, 16), (8, 32), (4, 56))[length])
    x = images(*((4, 8), (4, 9), (3, 11))[length])
    return x.contiguous(memory_format=torch.channels_last) if kind == "channels last" else x


def run(
    kind: str, policy: str, scope: str, stop: int | None, attach_first: bool
) -> tuple[list[Any], dict[str, Tensor]]:
    build = Text if kind == "text" else convolutions
    example = batch_of(kind, 0)
    budget = f"{int(1.35 * minimum(build(), example))} B" if scope == "peak" else "update:10 KiB"
    stepped: list[Any] = []

    def begin() -> tuple[nn.Module, trady.Tuner]:
        model = build()
        return model, trady.prepare(model, example, budget=budget, policy=policy, seed=3)

    def optimizer_of(tuner: trady.Tuner) -> torch.optim.Optimizer:
        return tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))

    model, tuner = begin()
    optimizer = optimizer_of(tuner)
    for step in range(8):
        if step == stop:
            state, moments = through_a_file(tuner.state_dict(), optimizer.state_dict())
            state = {"tensors": state["tensors"], "meta": json.loads(json.dumps(state["meta"]))}
            tuner.finish()
            model, tuner = begin()
            if attach_first:
                optimizer = optimizer_of(tuner)
            tuner.load_state_dict(state)
            if not attach_first:
                optimizer = optimizer_of(tuner)
            optimizer.load_state_dict(moments)
        if step and step % 2 == 0:
            tuner.resample(step // 2)
        x = batch_of(kind, step)
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped.append((float(loss.detach()), tuner.selection.digest))
    return stepped, snapshot(tuner.finish())


@pytest.mark.parametrize(
    ("kind", "policy", "scope", "attach_first"),
    [
        ("text", "dynamic-random", "peak", False),
        ("text", "dynamic-random", "peak", True),
        ("text", "trady", "peak", False),
        ("image", "static-random", "peak", True),
        ("channels last", "dynamic-random", "peak", False),
        ("image", "dynamic-random", "update", False),
    ],
)
def test_a_resumed_loop_whose_lengths_grow_ends_bit_for_bit(
    kind: str, policy: str, scope: str, attach_first: bool
) -> None:
    expected, weights = run(kind, policy, scope, None, attach_first)
    assert len({digest for _, digest in expected[2:4]}) == 2  # it was adapted to in the middle of an epoch
    stepped, restarted = run(kind, policy, scope, 5, attach_first)
    assert stepped == expected
    assert same(weights, restarted)


def seen_state() -> tuple[trady.Tuner, dict[str, Any]]:
    budget = f"{int(1.35 * minimum(Text(), ids(16, 16)))} B"
    tuner = trady.prepare(Text(), ids(16, 16), budget=budget, policy="dynamic-random")
    tuner.model(ids(8, 32))
    state = tuner.state_dict()
    tuner.finish()
    return trady.prepare(Text(), ids(16, 16), budget=budget, policy="dynamic-random"), state


def test_what_was_seen_is_in_the_state_with_the_values_of_its_ids() -> None:
    fresh, state = seen_state()
    (seen,) = state["meta"]["seen"]
    assert seen["waiting"] == 0
    assert not seen["accumulates"]
    assert torch.equal(state["tensors"]["@seen/0/0"], ids(8, 32))
    before = fresh.selection.count
    fresh.load_state_dict(state)
    assert fresh.selection.count < before
    assert fresh.state_dict()["meta"]["seen"] == state["meta"]["seen"]
    planned = trady.prepare(Text(), ids(16, 16), budget="4 MiB", policy="dynamic-random")
    assert "seen" not in planned.state_dict()["meta"]


@pytest.mark.parametrize(
    "damage",
    [
        {"batches": [{"tensor": {"dtype": "int64", "shape": [8, 32], "stride": [32, 1], "values": "@seen/9/9"}}]},
        {"batches": [{"tensor": {"dtype": "load", "shape": [8, 32], "stride": [32, 1]}}]},
        {"batches": [{"tensor": {"dtype": "int64", "shape": [8], "stride": [1], "values": "@seen/0/0"}}]},
        {"batches": [{"tensor": {"dtype": "float32", "shape": [2**40, 2**40], "stride": [2**40, 1]}}]},
        {"batches": [{"set": [1]}]},
        {"batches": [3]},
        {"batches": [{"value": "no batch"}]},
        {"autocast": "nn"},
        {"waiting": -1},
    ],
)
def test_what_is_damaged_is_refused_and_nothing_changes(damage: dict[str, Any]) -> None:
    fresh, state = seen_state()
    before = fresh.selection
    (seen,) = state["meta"]["seen"]
    with pytest.raises(CheckpointError):
        fresh.load_state_dict({**state, "meta": {**state["meta"], "seen": [{**seen, **damage}]}})
    assert fresh.selection == before
