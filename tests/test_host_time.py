"""Decided once, replayed: a step that follows the trace asks nothing again; what leaves it is computed as before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from benchmarks.host import __main__ as command
from benchmarks.host.profile import PARTS, where_it_goes
from benchmarks.host.tasks import NARROW, narrow_bert, narrow_llama, narrow_resnet, with_samples
from benchmarks.tasks import Task
from tests.small_workloads import TOY
from trady.interception.handlers import Handlers
from trady.interception.interceptor import Interceptor
from trady.interception.program import Program

SMALL: dict[str, Callable[[], Task]] = {
    "llama": partial(narrow_llama, 2),
    "bert": partial(narrow_bert, 2),
    "resnet": partial(narrow_resnet, (1, 1)),
}


def tuned(task: Task, recompute: str = "none", budget: str = "100%") -> trady.Tuner:
    tuner = trady.prepare(
        task.model, task.batch, budget="elements:3000", policy="dynamic-random", seed=0, recompute=recompute
    )
    task.model.train()
    return tuner


def gradients(task: Task, tuner: trady.Tuner) -> dict[str, Tensor]:
    for parameter in tuner.parameters():
        parameter.grad = None
    task.run().backward()
    return {name: p.grad.clone() for name, p in tuner.named_parameters() if p.grad is not None}


@contextmanager
def counting(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Note the functions that a method is called with."""
    seen: list[Any] = []
    method = getattr(owner, name)

    def noted(self: Any, function: Any, *rest: Any, **named: Any) -> Any:
        seen.append(function)
        return method(self, function, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, noted)
        yield seen


@pytest.mark.parametrize("name", list(SMALL))
def test_a_step_that_follows_the_trace_recognises_no_layer_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SMALL[name]()
    tuner = tuned(task)
    with counting(Handlers, "compute", monkeypatch) as first:
        gradients(task, tuner)
    with counting(Handlers, "compute", monkeypatch) as second:
        gradients(task, tuner)
    layers = {F.linear, torch.conv2d}
    # The head trains through PyTorch's own backward, and is asked every time.
    assert sum(f in layers for f in first) > 5
    assert sum(f in layers for f in second) <= 1
    tuner.finish()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_recomputed_step_writes_nothing_down_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SMALL[name]()
    tuner = tuned(task, recompute="all")
    assert tuner.plan.recomputed
    with counting(Program, "write", monkeypatch) as first:
        gradients(task, tuner)
    with counting(Program, "write", monkeypatch) as second:
        gradients(task, tuner)
    assert len(first) > 20
    assert second == []
    tuner.finish()


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", list(SMALL))
def test_replayed_gradients_are_those_of_the_first_step(name: str, recompute: str) -> None:
    """Also after the channels were drawn again."""
    task = SMALL[name]()
    tuner = tuned(task, recompute=recompute)
    for epoch in range(2):
        tuner.resample(epoch)
        before = gradients(task, tuner)
        for found in (gradients(task, tuner), gradients(task, tuner)):
            assert found.keys() == before.keys()
            assert all(torch.equal(found[key], before[key]) for key in before)
    tuner.finish()


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_another_batch_is_computed_as_if_nothing_had_been_decided(recompute: str) -> None:
    """A mask that comes in the third step, and goes again."""
    task = narrow_bert(2)
    other = replace(task, batch={**task.batch, "attention_mask": torch.ones(4, 16, dtype=torch.long).tril(10)})
    fresh = tuned(narrow_bert(2), recompute)
    wanted = [gradients(replace(each, model=fresh.model), fresh) for each in (other, task)]
    fresh.finish()
    tuner = tuned(task, recompute)
    for each, want in ((task, wanted[1]), (task, wanted[1]), (other, wanted[0]), (task, wanted[1]), (other, wanted[0])):
        found = gradients(each, tuner)
        assert all(torch.allclose(found[key], want[key], rtol=1e-5, atol=1e-7) for key in want)
    tuner.finish()


class _Two(nn.Module):
    """The same functions in another order, by a flag: a place must not answer for its neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.turned = False

    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.second, self.first) if self.turned else (self.first, self.second)
        scores: Tensor = self.head(torch.tanh(two(torch.tanh(one(x)))))
        return scores


def test_a_place_answers_for_its_own_weight_alone() -> None:
    torch.manual_seed(0)
    model, x = _Two(), torch.randn(5, 6)
    tuner = trady.prepare(model, x, budget="elements:1000", policy="full", fuse=False)
    for turned in (False, False, True, False, True, True):
        model.turned = turned
        found = model(x)
        with tuner.untouched():
            assert torch.equal(found, model(x))
    tuner.finish()


def test_plain_calls_are_done_without_the_interception_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    task = narrow_bert(2)
    tuner = tuned(task)
    gradients(task, tuner)
    with counting(Interceptor, "call", monkeypatch) as asked:
        gradients(task, tuner)
    assert len(asked) <= 2  # the head, and the loss outside of the model is none
    tuner.finish()


def test_channels_drawn_between_two_steps_are_those_that_train() -> None:
    task = SMALL["llama"]()
    tuner = tuned(task)
    first = gradients(task, tuner)
    tuner.resample(1)
    second = gradients(task, tuner)
    shapes = {name: tuple(p.shape) for name, p in tuner.named_parameters()}
    assert all(tuple(gradient.shape) == shapes[name] for name, gradient in second.items())
    assert first.keys() != second.keys() or any(not torch.equal(first[n], second[n]) for n in first)
    tuner.finish()


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_times_every_method_and_says_where_the_time_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "NARROW", {"bert": replace(NARROW["bert"], make=lambda models: SMALL["bert"]())})
    monkeypatch.setattr(command, "WORKLOADS", {"toy": replace(TOY, blocks=("Block",))})
    target = tmp_path / "host.json"
    arguments = ["--narrow", "bert", "--workload", "toy", "--batch", "1", "2", "--repeats", "2", "--profile", "1"]
    assert command.run([*arguments, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    narrow = found["narrow"]["bert"]
    assert set(narrow["seconds"]) == set(command.NARROW_METHODS)
    assert narrow["over"]["full"]["full"] == 1 == narrow["over"]["checkpoint"]["checkpoint"]
    assert set(narrow["parts"]["trady-recomputed"]) == set(PARTS)
    assert set(found["batches"]) == {"toy × 1", "toy × 2"}
    assert {aim["method"] for aim in found["aims"]} == {"trady-keep", "trady-recomputed"}
    assert "bookkeeping" in capsys.readouterr().out


def test_a_smaller_batch_has_its_labels() -> None:
    task = with_samples(replace(TOY), 1).make(Path())
    assert len(task.batch) == 1
    task.run().backward()


def test_what_a_builtin_takes_is_put_down_to_whoever_calls_it() -> None:
    def run() -> None:
        sorted(range(1000), key=lambda n: -n)

    parts = where_it_goes(run, 2)
    assert parts["the model"] > 0
    assert parts["lean operations"] == 0
