"""Decided once, replayed: a step that follows the trace asks nothing again; what leaves it is computed as before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import trady
from benchmarks.host import __main__ as command
from benchmarks.host.profile import PARTS, where_it_goes
from benchmarks.host.tasks import NARROW, narrow_bert, narrow_llama, narrow_resnet, with_samples
from benchmarks.tasks import Task
from tests.small_workloads import TOY
from trady.interception.handlers import Handlers
from trady.interception.interceptor import Interceptor
from trady.interception.layer import ArmedLayer
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


# -- asked of all layers at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SMALL))
def test_a_step_that_nobody_wrote_in_asks_no_layer_whether_its_weight_was_written_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = SMALL[name]()
    tuner = tuned(task)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    asked: list[str] = []
    follow = ArmedLayer.follow

    def noted(layer: ArmedLayer) -> None:
        asked.append(layer.name)
        follow(layer)

    monkeypatch.setattr(ArmedLayer, "follow", noted)

    def step() -> None:
        task.run().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    assert asked == []
    layers = [layer for layer in tuner._armed.layers.values() if layer.selected is not None]
    written, read = layers[0], layers[-1]
    written.weight.data.mul_(2)  # no version says so
    read.compact.data.neg_()
    step()
    assert {written.name, read.name} <= set(asked)
    for layer in layers:
        assert layer.selected is not None
        assert torch.equal(layer.compact, layer.truth.gather(layer.selected))
    tuner.finish()


def test_weights_are_functions_of_their_channels_by_one_node_and_each_has_its_own_gradient() -> None:
    task = SMALL["llama"]()
    tuner = tuned(task)
    layers = [layer for layer in tuner._armed.layers.values() if layer.selected is not None]
    node_of = vars(torch._C.TensorBase)["grad_fn"].__get__  # what the class of a shown weight hides
    assert len(layers) > 5
    assert len({node_of(layer.weight) for layer in layers}) == 1
    first, second, *others = layers
    (first.weight.square().sum() + 3 * second.weight.sum()).backward()
    assert first.compact.grad is not None
    assert second.compact.grad is not None
    assert torch.allclose(first.compact.grad, 2 * first.compact)
    assert torch.equal(second.compact.grad, torch.full_like(second.compact, 3))
    assert all(layer.compact.grad is None for layer in others)
    tuner.finish()


def test_the_end_of_a_module_is_heard_of_where_it_is_called_by_itself() -> None:
    """And before hooks that were hung in since the model was armed: what they compute is theirs."""
    task = SMALL["llama"]()
    tuner = tuned(task)
    block = next(module for name, module in task.model.named_modules() if name.endswith("layers.0.mlp"))
    heard = [module for module in task.model.modules() if module._forward_hooks]
    assert heard == [task.model]
    during: list[int] = []
    handle = block.register_forward_hook(lambda *call: during.append(len(_get_current_function_mode_stack())))
    for raises in (False, True):
        x = torch.ones(1, 1, 3 if raises else 64)
        with pytest.raises(RuntimeError) if raises else nullcontext():
            block(x).sum().backward()
        assert not _get_current_function_mode_stack()
    assert during == [0]
    assert any(parameter.grad is not None for parameter in tuner.parameters())
    handle.remove()
    tuner.finish()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.model.modules())
