"""A GPU that is full: the message says what was predicted, what was found free, and what would fit.

No CUDA device is needed: a step raises what PyTorch raises, and the driver's answers are given.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import trady
from tests.models import normal
from tests.small_runs import run
from tests.small_task import small_data, small_net
from trady.planning.budget import parse_budget
from trady.report.units import format_bytes
from trady.training.batch import forward
from trady.tuner.full_device import DeviceMemory, out_of_memory, warn_if_full

MIB = 1 << 20

SAID = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.25 GiB, 3.00 MiB of it free."


def no_room(monkeypatch: pytest.MonkeyPatch, step: int = 3) -> None:
    """Raise in the forward pass of that step, and of no simulated one."""
    left, plain = [step], forward

    def full(model: nn.Module, inputs: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise torch.OutOfMemoryError(SAID)
        return plain(model, inputs)

    monkeypatch.setattr("trady.training.step.forward", full)


def with_memory(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int = 0, total: int = 80 << 30) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)


def refused(monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    with monkeypatch.context() as patch:
        if "optimizer" not in options:
            no_room(patch)
        return _refused(**options)


def _refused(**options: Any) -> str:
    with pytest.raises(trady.ResourceError) as raised:
        run(None, policy="dynamic-random", epochs=1, **options)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    return str(raised.value)


def named(message: str, before: str) -> str:
    found = re.search(before + r' ?"?([^";]+)', message)
    assert found is not None, message
    return found[1]


def test_what_would_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget that the message names is below what is free, and possible."""
    with_memory(monkeypatch, free=50 << 10, reserved=70 << 10)
    message = refused(monkeypatch, budget="peak:1 MiB")
    assert message.startswith("the GPU's memory ran out (CUDA out of memory. Tried to allocate 20.00 MiB)")
    assert "120.0 KiB of its 80.0 GiB are there for this process (50.0 KiB free, 70.0 KiB in its allocator)" in message
    predicted = named(message, "a step was predicted to take")
    budget = named(message, "budget=")
    assert parse_budget(budget).amount <= 0.9 * (120 << 10)
    result = run(None, policy="dynamic-random", epochs=1, budget=budget)
    assert result.peak_bytes <= parse_budget(budget).amount
    full = run(None, policy="dynamic-random", epochs=1, budget="peak:1 MiB")
    assert full.peak_bytes > 0.9 * (120 << 10)
    plan = trady.plan(small_net(), small_data(48, 0).batch(range(8))[0], policy="dynamic-random", budget="peak:1 MiB")
    assert predicted.startswith(format_bytes(plan.predicted_peak_bytes or 0))


def test_where_no_budget_would_fit_a_smaller_batch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=200 << 10)
    data = small_data(128, 0), small_data(24, 1)
    message = refused(monkeypatch, budget="peak:2 MiB", batch_size=32, data=data)
    assert "with this batch, no budget below" in message
    size = int(re.findall(r"(\d+) samples? at a time", message)[0])
    assert 1 <= size < 32
    model = small_net()
    example = small_data(64, 0).batch(range(size))[0]
    plan = trady.plan(model, example, policy="dynamic-random", budget="peak:180 KiB")
    assert (plan.predicted_peak_bytes or 0) <= 180 << 10


def test_a_step_that_should_have_fitted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=8 << 30)
    message = refused(monkeypatch, budget="peak:1 MiB")
    assert "which that fits in" in message
    assert "expandable_segments" in message


def test_a_budget_that_is_no_peak_is_predicted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=MIB)
    assert "a step was predicted to take" in refused(monkeypatch, budget="elements:900")


def test_an_optimizer_that_has_no_room_for_its_state_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=MIB)

    class NoRoom(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise torch.OutOfMemoryError(SAID)

    message = refused(monkeypatch, budget="peak:1 MiB", optimizer=lambda parameters: NoRoom(parameters, lr=0.1))
    assert "a step was predicted to take" in message


def test_full_fine_tuning_predicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    no_room(monkeypatch)
    with pytest.raises(trady.ResourceError, match=r"memory ran out \(CUDA out of memory"):
        run(None, policy="full")


def test_a_loop_of_ones_own_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=60 << 10)
    x = normal(8, 3, 12, 12)
    tuner = trady.prepare(small_net(), x, budget="peak:1 MiB", policy="dynamic-random")
    before = tuner.selection
    told = str(out_of_memory(tuner, x, torch.OutOfMemoryError(SAID)))
    assert "was predicted" in told
    assert tuner.selection == before, "nothing has changed"
    nn.functional.cross_entropy(tuner.model(x), torch.zeros(8, dtype=torch.int64)).backward()
    tuner.finish()


def test_a_device_that_has_less_than_the_plan_takes_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=60 << 10)
    tuner = trady.prepare(small_net(), normal(8, 3, 12, 12), budget="peak:1 MiB", policy="dynamic-random")
    warn_if_full(tuner)  # on the CPU it asks nobody
    monkeypatch.setattr(tuner.model, "parameters", lambda: iter([OnCuda()]))
    with pytest.warns(trady.TradyWarning, match=r"is predicted to take .* of the GPU, and 60\.0 KiB of its") as said:
        warn_if_full(tuner)
    assert 'budget="peak:54 KiB" would fit' in str(said[0].message)
    monkeypatch.undo()
    tuner.finish()


class OnCuda:
    device = torch.device("cuda")


def test_what_is_usable_is_less_than_what_is_free() -> None:
    memory = DeviceMemory(free=6 << 30, reserved=4 << 30, total=16 << 30)
    assert memory.available == 10 << 30
    assert memory.usable == 9 << 30
