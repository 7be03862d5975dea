"""Segments that are recomputed: nothing of their insides is kept."""

from __future__ import annotations

import gc
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import trady
import trady.interception.deferred_segment
from tests.against_dense import armed
from tests.models import normal, seeded
from tests.recomputed_models import VisionTransformer, loss_of, recomputed_model, tokens
from tests.recomputing import anew, worst
from trady.interception.program import Program
from trady.ops import recompute
from trady.ops.context import simulated_device_type

pytestmark = pytest.mark.usefixtures("one_sample_a_part")


def backward(model: nn.Module, batch: Any) -> None:
    loss_of(batch)(model).backward()


@pytest.mark.parametrize("name", ["BERT", "GPT-2, loss", "ViT, by hand", "EfficientNet, by hand"])
def test_what_is_kept_is_what_enters_the_segments_and_what_lies_outside(name: str) -> None:
    model, batch = recomputed_model(name, torch.float32)
    ledgers = {}
    for mode in ("none", "all"):
        tuner = armed(model, batch, recompute=mode)
        ledgers[mode] = tuner.ledger(lambda: loss_of(batch)(model).backward())
        if mode == "all":
            segments = tuner._draws.moment.recomputation.segments.training
            entries = sum(segment.entry_bytes for segment in segments)
        tuner.finish()
    anchors = ledgers["all"].saved_bytes_of("anchors")
    assert 0 < anchors <= entries
    assert ledgers["all"].saved_bytes < 0.5 * ledgers["none"].saved_bytes
    inside = {segment.name for segment in segments}
    others = [s for s in ledgers["all"].saved if s.kind != "anchors" and s.layer in inside]
    assert sum(s.bytes for s in others) <= entries, others


def test_what_grows_with_depth_is_the_activations_that_enter() -> None:
    saved = []
    for depth in (2, 4):
        model, x = seeded(partial(VisionTransformer, depth=depth)), normal(4, 3, 12, 12)
        tuner = anew(model, x)
        saved.append(tuner.ledger(partial(backward, model, x)).saved_bytes)
        tuner.finish()
    assert saved[1] - saved[0] == 2 * 2 * 4 * 10 * 32 * 4  # two segments a block


@pytest.mark.parametrize("name", ["GPT-2, loss", "Swin"])
def test_nothing_is_alive_after_a_step_without_the_garbage_collector(name: str) -> None:
    model, batch = recomputed_model(name)
    tuner = anew(model, batch)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))

    def step() -> int:
        loss_of(batch)(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        kinds = (Tensor, nn.Parameter, Program, recompute.Recipe)
        return sum(type(thing) in kinds for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        assert step() == step()
    finally:
        gc.enable()
    tuner.finish()


def test_no_part_outlives_its_turn() -> None:
    """With the garbage collector off, the peak of a step does not grow with the number of parts."""
    peaks = []
    for batch in (2, 8):
        model, x = seeded(lambda: VisionTransformer(width=32, depth=1)), normal(batch, 3, 48, 48)
        tuner = anew(model, x)
        loss_of(x)(model).backward()
        tuner.model.zero_grad()
        gc.collect()
        gc.disable()
        try:
            ledger = tuner.ledger(partial(backward, model, x), inference=False)
        finally:
            gc.enable()
        peaks.append(ledger.working_peak_bytes)
        tuner.finish()
    tokens_bytes = 6 * (12 * 12 + 1) * 32 * 4  # six samples more
    assert peaks[1] - peaks[0] < 8 * tokens_bytes  # attention maps of a sample alone are 4 * 145 times as wide


def test_a_forward_pass_that_is_let_go_leaves_nothing_alive() -> None:
    model, batch = recomputed_model("BERT")
    tuner = anew(model, batch)

    def alive() -> int:
        model(**batch)
        return sum(type(thing) in (Tensor, Program, recompute.Recipe) for thing in gc.get_objects())

    alive()
    gc.collect()
    gc.disable()
    try:
        assert alive() == alive()
    finally:
        gc.enable()
    tuner.finish()


def test_a_part_is_as_large_as_caches_are(monkeypatch: pytest.MonkeyPatch, parts: list[int]) -> None:
    monkeypatch.setattr(trady.interception.deferred_segment, "_CHUNK_BYTES", 2 * 7 * 64 * 8)
    model, _ = recomputed_model("BERT")
    tuner = anew(model, {"input_ids": tokens(5, 7)})
    assert worst(model, tuner, loss_of({"input_ids": tokens(5, 7, seed=2)})) < 1e-10
    assert max(parts) == 3  # 2 + 2 + 1 samples
    tuner.finish()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_simulated_step_cuts_the_batch_as_the_device_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trady.interception.deferred_segment, "_CHUNK_BYTES", 4 << 20)
    fakes = [torch.empty(64, 1 << 20, device="meta")]
    real, simulated = (SimpleNamespace(device=torch.device(device), fakes=fakes, batch=64) for device in (kind, "meta"))
    at_once = trady.interception.deferred_segment._samples_at_once
    token = simulated_device_type.set(kind)
    try:
        assert at_once(cast(Any, simulated)) == at_once(cast(Any, real)) == {"cpu": 1, "cuda": 16}[kind]
    finally:
        simulated_device_type.reset(token)
