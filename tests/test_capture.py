"""A captured step: what is replayed, what is copied, and when it runs as it is.

No CUDA device is needed: here a graph runs its pass again, on the memory that it was recorded with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.simulated_graph import SimulatedGraph
from trady.tuner import capture
from trady.tuner.capture import WARM_UP, CapturedStep


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).mean((2, 3)))
        return scores


def batch(seed: int, samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 6, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


@pytest.fixture(autouse=True)
def _count_graphs() -> None:
    SimulatedGraph.made = []


def armed(policy: str = "dynamic-random", **options: Any) -> trady.Tuner:
    torch.manual_seed(0)
    return trady.prepare(Net().train(), batch(0)[0], budget="elements:700", policy=policy, **options)


def passes(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return run


def captured(tuner: trady.Tuner, run: Callable[..., Any] | None = None) -> CapturedStep:
    made = tuner.capture(run or passes(tuner.model))
    return CapturedStep(made._step, made._about, lambda: SimulatedGraph(lambda: made._about.trained))


def train(tuner: trady.Tuner, step: Callable[..., Any], *, epochs: int = 2, steps: int = 6) -> list[float]:
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    losses = []
    for epoch in range(epochs):
        tuner.resample(epoch)
        for index in range(steps):
            losses.append(float(step(*batch(10 * epoch + index)).detach()))
            tuner.clip_gradients()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return losses


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_training_with_replayed_passes_is_the_same() -> None:
    plain, replayed = armed(), armed()
    with no_warning():
        losses = train(plain, passes(plain.model))
        assert train(replayed, captured(replayed)) == losses
    assert len(SimulatedGraph.made) == 2, "one graph a draw"
    assert [graph.replays for graph in SimulatedGraph.made] == [6 - WARM_UP] * 2
    assert plain.selection == replayed.selection
    wanted, got = plain.finish().state_dict(), replayed.finish().state_dict()
    # The simulated graph computes when it records, a real one does not: batch norms have seen one batch more a draw.
    statistics = {name for name in wanted if "running" in name or "tracked" in name}
    for name in wanted.keys() - statistics:
        assert torch.equal(wanted[name], got[name]), name


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_add_up_as_ever(to_none: bool) -> None:
    plain, replayed = armed(), armed()
    step = captured(replayed)
    for index in range(WARM_UP + 3):
        for run in (passes(plain.model), step):
            for part in range(3):
                run(*batch(3 * index + part))
        for a, b in zip(plain.parameters(), replayed.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad if b.grad is not None else a.grad + 1)
        for tuner in (plain, replayed):
            for parameter in tuner.parameters():
                parameter.grad = None if to_none or parameter.grad is None else parameter.grad.zero_()
    assert SimulatedGraph.made[-1].replays > 3


def test_what_is_returned_stays_as_it_was() -> None:
    tuner = armed()
    step = captured(tuner)
    losses = [step(*batch(index)) for index in range(WARM_UP + 3)]
    assert len({float(loss) for loss in losses}) == len(losses)
    assert not any(loss.requires_grad for loss in losses)


def test_another_shape_runs_as_it_is_and_the_graph_stays() -> None:
    tuner = armed()
    step = captured(tuner)
    for index in range(WARM_UP + 1):
        step(*batch(index))
    with pytest.warns(trady.TradyWarning, match="not of the recorded shape"):
        step(*batch(5, samples=2))
    assert step.reason is not None
    with no_warning():
        step(*batch(6))
        step(*batch(7, samples=2))  # said once
    assert step.reason is None or "shape" in step.reason
    assert len(SimulatedGraph.made) == 1
    assert SimulatedGraph.made[0].replays == 2


@pytest.mark.parametrize("change", ["draw", "eval", "checkpoint", "norm"])
def test_what_the_kernels_depend_on_is_recorded_anew(change: str) -> None:
    tuner = armed()
    step = captured(tuner)
    for index in range(WARM_UP + 1):
        step(*batch(index))
    if change == "draw":
        tuner.resample(1)
    elif change == "eval":
        tuner.model.eval()
    elif change == "checkpoint":
        tuner.model.load_state_dict(copy.deepcopy(tuner.model.state_dict()))
    else:
        with torch.no_grad():
            tuner.model.get_submodule("body.1").weight.mul_(2)  # type: ignore[operator]
    plain = float(F.cross_entropy(tuner.model(batch(9)[0]), batch(9)[1]).detach())
    assert float(step(*batch(9))) == pytest.approx(plain, abs=0)
    for index in range(WARM_UP):
        step(*batch(index))
    assert len(SimulatedGraph.made) == 2


def test_a_ranking_is_learnt_from_passes_that_run() -> None:
    tuner = armed("trady", ranking="online")
    step = captured(tuner)
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    with no_warning():
        for index in range(WARM_UP + 3):
            step(*batch(index))
    assert not SimulatedGraph.made
    assert step.reason is not None
    assert "learnt" in step.reason
    tuner.resample(1)
    for index in range(WARM_UP + 1):
        step(*batch(index))
    assert len(SimulatedGraph.made) == 1


def test_a_step_that_reads_values_on_the_host_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = armed()
    recording: list[bool] = []
    usual = SimulatedGraph.record

    def record(graph: SimulatedGraph, run: Callable[[], Any]) -> Any:
        recording.append(True)
        try:
            return usual(graph, run)
        finally:
            recording.clear()

    def run(x: Tensor, y: Tensor) -> Tensor:
        if recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return passes(tuner.model)(x, y)

    monkeypatch.setattr(SimulatedGraph, "record", record)
    step = captured(tuner, run)
    for index in range(WARM_UP):
        step(*batch(index))
    gradients = [p.grad for p in tuner.parameters()]
    with pytest.warns(trady.TradyWarning, match=r"cannot be recorded \(RuntimeError: CUDA error: operation"):
        step(*batch(7))
    assert all(a is b or a is None for a, b in zip(gradients, [p.grad for p in tuner.parameters()], strict=True))
    with no_warning():
        step(*batch(8))
    assert len(SimulatedGraph.made) == 1, "not tried again"


def test_an_optimizer_inside_is_refused() -> None:
    tuner = armed()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))

    def run(x: Tensor, y: Tensor) -> Tensor:
        loss = passes(tuner.model)(x, y)
        optimizer.step()
        return loss

    with pytest.raises(trady.StateError, match="Capture forward and backward alone"):
        captured(tuner, run)(*batch(0))
    optimizer.step()  # outside it may


def test_updates_inside_the_backward_pass_run_as_they_are() -> None:
    tuner = armed()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.1))
    with pytest.warns(trady.TradyWarning, match="updates inside the backward pass"):
        captured(tuner)(*batch(0))
    del optimizer


def test_without_a_cuda_device_it_says_so_once_and_runs() -> None:
    tuner = armed()
    step = tuner.capture(passes(tuner.model))
    with pytest.warns(trady.TradyWarning, match="one CUDA device, they are on cpu"):
        loss = step(*batch(0))
    assert loss.isfinite()
    assert any(p.grad is not None for p in tuner.parameters())
    with no_warning():
        step(*batch(1))


def test_a_tensor_that_is_there_twice_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = armed()
    seen: list[bool] = []

    def run(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        seen.append(a is b)
        return passes(tuner.model)(a, y)

    step = captured(tuner, run)
    for index in range(WARM_UP + 2):
        x, y = batch(index)
        step(x, x, y)
    assert all(seen)
    x, y = batch(7)
    with pytest.warns(trady.TradyWarning, match="not of the recorded shape"):
        step(x, x + 1, y)  # one place cannot hold both
    assert not seen[-1]


def test_a_finished_tuner_captures_nothing() -> None:
    tuner = armed()
    tuner.finish()
    with pytest.raises(trady.StateError, match="finished"):
        tuner.capture(lambda: None)
    assert capture.WARM_UP > 0
