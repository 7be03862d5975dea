"""What an optimizer needs for a moment is in the predicted peak: weights, not activations, decide these budgets."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import trady
from tests.models import normal, seeded
from tests.tight_budget import predicted_peak
from trady.memory import LiveBytes
from trady.optim.clipping import clip_by_output, clip_channels_
from trady.planning.budget import InfeasibleBudgetError, parse_budget
from trady.simulation.optimizer_memory import Form, OptimizerMemory
from trady.simulation.optimizer_probe import optimizer_memory
from trady.training.optimizers import NAMES, memory_of, optimizer_factory

WIDTH, SAMPLES, CLASSES = 128, 32, 10
LABELS = torch.arange(SAMPLES) % CLASSES

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "Adafactor, foreach": lambda p: torch.optim.Adafactor(p, lr=1e-3, foreach=True),
    "AdamW in backward": lambda p: trady.optim.AdamW(p, lr=1e-3, channel_clip=0.1),
}


def wide() -> nn.Module:
    """Weights of 390 KiB, and a batch of 16."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return seeded(lambda: nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)))


def ledgers(tuner: trady.Tuner, optimizer: torch.optim.Optimizer, x: Tensor) -> list[trady.Ledger]:
    """Three steps: in the first the optimizer makes its state."""

    def step() -> None:
        F.cross_entropy(tuner.model(x), LABELS).backward()
        tuner.clip_gradients()
        optimizer.step()
        optimizer.zero_grad()

    return [tuner.ledger(step, inference=False) for _ in range(3)]


@pytest.mark.parametrize("budget", ["peak:620 KiB", "peak:900 KiB"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_of_an_optimizer_exceeds_a_tight_budget(name: str, budget: str) -> None:
    model, x = wide(), normal(SAMPLES, WIDTH)
    tuner = trady.prepare(model, x, budget=budget, policy="dynamic-random")
    optimizer = tuner.attach(OPTIMIZERS[name](tuner.parameters()))
    predicted, found = predicted_peak(tuner.plan), ledgers(tuner, optimizer, x)
    limit = parse_budget(budget).amount
    assert max(ledger.peak_bytes for ledger in found) <= limit
    assert abs(predicted / found[-1].peak_bytes - 1) < 0.005
    assert found[-1].peak_bytes > 0.93 * limit
    assert found[-1].parts["optimizer state"] == tuner.plan.predicted_parts.get("optimizer state", 0)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_at_the_least_budget_the_labels_fit_too(name: str) -> None:
    x = normal(SAMPLES, WIDTH)
    with pytest.raises(InfeasibleBudgetError) as refused:
        trady.plan(wide(), x, budget="1 KiB", policy="dynamic-random")
    least = refused.value.least_amount
    if name == "AdamW":  # which keeps a state of the head
        tuner = trady.prepare(wide(), x, budget=f"peak:{least} B", policy="dynamic-random")
        with pytest.raises(InfeasibleBudgetError) as refused:
            tuner.attach(OPTIMIZERS[name](tuner.parameters()))
        least = refused.value.least_amount
    tuner = trady.prepare(wide(), x, budget=f"peak:{least} B", policy="dynamic-random")
    found = ledgers(tuner, tuner.attach(OPTIMIZERS[name](tuner.parameters())), x)
    assert max(ledger.peak_bytes for ledger in found) <= least
    assert tuner.plan.predicted_peak_bytes == found[-1].peak_bytes


@pytest.mark.filterwarnings("ignore:accuracy .* and guessing has:trady.errors.TradyWarning")
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adamw-in-backward"])
def test_a_run_knows_its_optimizer_beforehand(name: str, tmp_path: Path) -> None:
    data = TensorDataset(normal(2 * SAMPLES, WIDTH), LABELS.repeat(2))
    budget = "peak:700 KiB"
    options: dict[str, Any] = {"batch_size": SAMPLES, "epochs": 2, "lr": 1e-3, "progress": False}
    trady.finetune(
        wide(), data, data, budget=budget, policy="dynamic-random", optimizer=name, out=tmp_path / "run", **options
    )
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["peak_bytes"] <= parse_budget(budget).amount for line in metrics)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_beforehand_is_what_is_measured_when_it_is_attached(name: str) -> None:
    factory = optimizer_factory(name, lr=1e-3, momentum=0.9 if "sgd" in name else 0.0, weight_decay=0.1)
    before = memory_of(factory, torch.device("cpu"))
    tuner = trady.prepare(wide(), normal(SAMPLES, WIDTH), budget="peak:2 MiB", policy="dynamic-random")
    tuner.attach(factory(tuner.parameters()))
    assert tuner._draws.moment.optimizer == before
    assert before.copies == (1 if "sgd" in name else 2)
    assert (before.in_backward is None) == ("in-backward" not in name)


def memory(name: str) -> OptimizerMemory:
    return optimizer_memory(OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 2))]))


def test_temporaries_are_those_of_a_parameter_or_of_all() -> None:
    assert memory("SGD") == OptimizerMemory()
    assert memory("SGD, momentum") == OptimizerMemory(copies=1)
    assert memory("SGD, nesterov") == OptimizerMemory(copies=1, current=2)
    assert memory("SGD, foreach") == OptimizerMemory(copies=1, every=1)
    one_by_one, together = memory("AdamW"), memory("AdamW, foreach")
    assert (one_by_one.every, one_by_one.current, one_by_one.previous) == pytest.approx((0, 2, 1), abs=1e-2)
    assert (together.every, together.current, together.previous) == pytest.approx((1, 0, 0), abs=1e-2)
    assert memory("AdamW, fused") == OptimizerMemory(copies=2)


def test_a_factored_second_moment_takes_what_the_form_of_a_parameter_says() -> None:
    found = memory("Adafactor")
    for shape in [(7, 300), (300, 7), (5, 40, 1, 1), (9, 1, 3, 3), (4, 6, 5), (123,)]:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.ones(shape)
        optimizer = torch.optim.Adafactor([parameter])
        live = LiveBytes()
        live.register([parameter, parameter.grad])
        with live:
            optimizer.step()
        state = sum(t.nbytes for t in optimizer.state[parameter].values() if t.dim())
        form = Form.of(shape, 4)
        assert found.kept_bytes([form]) == state
        moment = live.peak - 2 * parameter.nbytes - state
        assert moment - 16 <= found.moment_bytes([form]) <= moment + 16  # a few single numbers
    assert found.copies == 2, "for budgets that count weights alone"


def test_a_state_that_follows_no_known_form_is_taken_at_its_most() -> None:
    class TwoSided(torch.optim.SGD):
        """Keeps a square of each side, as Shampoo does."""

        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                sides = parameter.flatten(1).shape
                self.state[parameter].update({str(i): torch.zeros(n, n) for i, n in enumerate(sides)})

    found = optimizer_memory(TwoSided([nn.Parameter(torch.zeros(2, 2))]))
    assert found.factored is None
    assert found.copies >= 4096


def convolutions() -> nn.Module:
    """Weights of 170 KiB behind small maps: a pointwise, a depthwise and an ordinary convolution."""
    layers = [nn.Conv2d(3, 128, 3, 2, 1), nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU()]
    layers += [nn.Conv2d(128, 128, 3, 2, 1, groups=128), nn.Conv2d(128, 16, 3), nn.Flatten(), nn.Linear(64, CLASSES)]
    return seeded(lambda: nn.Sequential(*layers))


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", ["Adafactor", "Adafactor, foreach", "AdamW"])
def test_convolutions_are_predicted_too(name: str, share: float) -> None:
    model, x = convolutions(), normal(2, 3, 16, 16)
    everything = trady.plan(model, x, budget="peak:1 GiB", policy="full").table.all_elements
    tuner = trady.prepare(model, x, budget=f"elements:{int(share * everything)}", policy="dynamic-random")
    optimizer = tuner.attach(OPTIMIZERS[name](tuner.parameters()))

    def step() -> None:
        F.cross_entropy(model(x), LABELS[:2]).backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = [tuner.ledger(step, inference=False).peak_bytes for _ in range(2)][-1]
    predicted = sum(tuner._decision.spending(tuner._draws.moment).peak_parts(tuner.selection).values())
    bound = tuner._decision.spending(tuner._draws.moment).peak(tuner.selection)
    assert 0.995 * measured <= predicted <= 1.03 * measured
    assert measured <= bound


def test_a_restart_knows_what_the_optimizer_takes_before_it_is_attached() -> None:
    x = normal(SAMPLES, WIDTH)
    tuner = trady.prepare(wide(), x, budget="peak:900 KiB", policy="dynamic-random")
    optimizer = tuner.attach(OPTIMIZERS["Adafactor"](tuner.parameters()))
    ledgers(tuner, optimizer, x)
    twin = trady.prepare(wide(), x, budget="peak:900 KiB", policy="dynamic-random")
    twin.load_state_dict(
        json.loads(json.dumps({"meta": tuner.state_dict()["meta"]})) | {"tensors": tuner.state_dict()["tensors"]}
    )
    assert twin.resample(1) == tuner.resample(1)
    assert twin._draws.moment.optimizer.amounts == tuner._draws.moment.optimizer.amounts


def test_an_optimizer_that_cannot_be_tried_out_is_taken_to_need_as_much_as_it_keeps() -> None:
    class Stubborn(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("not on these")

    assert optimizer_memory(Stubborn([nn.Parameter(torch.zeros(2, 2))])) == OptimizerMemory(copies=2, every=2)


@given(st.lists(st.integers(0, 1000), max_size=4), st.tuples(*[st.floats(0, 4)] * 3))
def test_the_bound_of_a_moment_holds_in_every_order(sizes: list[int], forms: tuple[float, float, float]) -> None:
    needs = OptimizerMemory(0, *forms)
    moments = [needs.moment_bytes(map(Form, order)) for order in permutations(sizes)]
    most = needs.most_moment_bytes(map(Form, sizes))
    assert max(moments) <= most
    if len(sizes) < 3:
        assert max(moments) >= most - 1 or forms[2] > forms[1]


@pytest.mark.parametrize("by_output", [False, True])
def test_clipping_takes_norms_and_nothing_of_the_size_of_a_gradient(by_output: bool) -> None:
    parameter = nn.Parameter(normal(64, 48, 3, 3))
    parameter.grad = 10 * torch.ones_like(parameter)
    clip_by_output(parameter, by_output)
    live = LiveBytes()
    live.register([parameter, parameter.grad])
    with live:
        clip_channels_([parameter], 0.1)
    dims = [dim for dim in range(4) if dim != int(by_output)]
    norms = [torch.linalg.vector_norm(t.detach(), dim=dims) for t in (parameter, parameter.grad)]
    torch.testing.assert_close(norms[1], 0.1 * norms[0])
    assert live.peak - 2 * parameter.nbytes <= 20 * 64
