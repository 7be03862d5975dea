"""What a training step waits for on CUDA: nothing; run by test_cuda_fake.py in a process of its own.

Each wait is a pause in which the device has nothing to do, and a step that waits cannot be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trady
from tests.fake_cuda import Waits, fake_cuda
from tests.on_cuda import MODELS, backward, loss_of, on_cuda
from trady.channels.selection import Selection
from trady.policies import Scheme, SparseUpdate, policy_names

#: The norm that clipping returns; it is computed on the device, and read once.
NORM = ["value"]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with fake_cuda(monkeypatch) as waits:
        yield waits


def seen_in(waits: Waits, run: Callable[[], object]) -> list[str]:
    waits.seen.clear()
    run()
    return list(waits.seen)


def prepared(name: str, **options: Any) -> tuple[trady.Tuner, Any]:
    model, batch = on_cuda(name)
    options = {"budget": "elements:3000", "policy": "dynamic-random", **options}
    return trady.prepare(model.train(), batch, **options), batch


def test_a_value_that_a_model_reads_is_seen(waits: Waits) -> None:
    x = torch.ones(3, device="cuda")
    assert seen_in(waits, lambda: bool((x > 0).all())) == ["value"]
    assert seen_in(waits, lambda: x.cpu()) == ["copy to cpu"]
    assert seen_in(waits, lambda: x.sum()) == []


@pytest.mark.parametrize(("recompute", "optimizer"), [("none", "SGD"), ("all", "AdamW")])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_the_norm_that_clipping_returns_and_for_nothing_else(
    name: str, optimizer: str, recompute: str, waits: Waits
) -> None:
    """In the steps that follow the first one as well, which replay what it has decided."""
    tuner, batch = prepared(name, recompute=recompute)
    trainer = tuner.attach(OPTIMIZERS[optimizer](tuner.parameters()))
    assert bool(tuner.plan.recomputed) == (recompute == "all" and name != "convolutional")
    for step in range(4):
        if step == 2:
            assert seen_in(waits, lambda: tuner.resample(1)) == []
        assert seen_in(waits, lambda: backward(tuner.model, batch)) == []
        assert seen_in(waits, tuner.clip_gradients) == NORM
        assert seen_in(waits, trainer.step) == []
        assert seen_in(waits, trainer.zero_grad) == []
    tuner.finish()


@pytest.mark.parametrize(("make", "recompute"), [(trady.optim.SGD, "none"), (trady.optim.AdamW, "all")])
def test_updates_inside_the_backward_pass_wait_once_for_each_gradient(make: Any, recompute: str, waits: Waits) -> None:
    """One that is not finite is dropped before its layer is updated, so its norm is read: of each layer, no more."""
    tuner, batch = prepared("vit", recompute=recompute)
    optimizer = tuner.attach(make(tuner.parameters(), channel_clip=0.1))
    layers, head = len(tuner.selection), len(tuner.plan.head) * 2
    for _ in range(2):
        assert seen_in(waits, lambda: backward(tuner.model, batch)) == NORM * layers
        assert seen_in(waits, optimizer.step) == NORM * head
        optimizer.zero_grad()
    tuner.finish()


class Neurons:
    """Output channels, as no registered policy but velocity draws them."""

    name, uses_ranking = "neurons", False

    def select(self, draw: Any) -> Selection:
        return trady.by_output(draw.table, {name: [0, 1] for name in draw.table.names[1:4]})


def policy_of(name: str) -> Any:
    return (
        SparseUpdate(Scheme((0, 2), (1, 0.5))) if name == "sparse-update" else Neurons() if name == "neurons" else name
    )


@pytest.mark.parametrize("policy", [*(p for p in policy_names() if "share" not in p), "neurons"])
def test_no_policy_makes_a_step_wait(policy: str, waits: Waits) -> None:
    """What a policy measures in front of an epoch may; its draws and steps do not."""
    budget = None if policy in ("full", "head") else "elements:30000"
    tuner, batch = prepared("convolutional", policy=policy_of(policy), budget=budget, ranking="structural")
    samples = len(batch)
    labels = torch.zeros(samples, dtype=torch.int64, device="cuda")
    optimizer = tuner.attach(OPTIMIZERS["SGD"](tuner.parameters()))
    if tuner.observation_due:
        tuner.observe([(batch, labels)], F.cross_entropy)
    for epoch in range(2):
        if not tuner.observation_due:
            tuner.resample(epoch)
        assert seen_in(waits, lambda: backward(tuner.model, batch)) == []
        assert seen_in(waits, tuner.clip_gradients) == NORM
        assert seen_in(waits, optimizer.step) == []
        optimizer.zero_grad()
    tuner.finish()


def test_parts_of_a_batch_and_gradients_that_add_up_wait_for_nothing(waits: Waits) -> None:
    tuner, batch = prepared("vit", micro_batch=2, accumulates=True)

    def step() -> None:
        for part, share in tuner.micro_batches(batch):
            (loss_of(tuner.model(part)) * share).backward()

    for _ in range(3):
        assert seen_in(waits, step) == []
    tuner.finish()


@pytest.mark.parametrize("budget", ["peak:100 MiB", "update:1 MiB"])
def test_a_budget_in_bytes_is_guarded_without_waiting(budget: str, waits: Waits) -> None:
    tuner, batch = prepared("convolutional", budget=budget)
    for _ in range(3):
        assert seen_in(waits, lambda: backward(tuner.model, batch)) == []
    tuner.finish()


class Asks(nn.Module):
    """A model that reads a value on the host: the wait is its own, and is there once a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = y / float(y.detach().abs().max())
        scores: torch.Tensor = self.head(torch.relu(y))
        return scores


def test_a_wait_of_the_model_itself_is_counted_once(waits: Waits) -> None:
    with torch.device("cuda"):
        model, x = Asks(), torch.randn(4, 8)
    tuner = trady.prepare(model, x, budget="elements:3000", policy="dynamic-random", fuse=False)
    backward(model, x)
    assert seen_in(waits, lambda: backward(model, x)) == ["value"]
    tuner.finish()
