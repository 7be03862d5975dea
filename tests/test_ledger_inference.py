"""The ledger finds the model of a step and measures an inference pass, leaving both as they were."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.measured_steps import FLOAT, net, weight_bytes
from trady.memory import Saved, measure


class Fickle(nn.Module):
    """A model that changes a buffer and draws random numbers in eval mode too."""

    calls: Tensor
    trained: ClassVar[list[tuple[bool, bool, bool]]] = []  # of the class: what an object keeps is put back

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.norm.training = False
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.trained.append((self.training, self.linear.training, torch.is_grad_enabled()))
        self.calls += 1
        return self.norm(self.linear(x)) + torch.rand(())

    def train(self, mode: bool = True) -> Fickle:
        raise AssertionError("train() may do more than set a flag")


def test_the_inference_pass_leaves_flags_buffers_and_random_numbers_alone() -> None:
    model = Fickle()
    x = torch.randn(4, 4)
    torch.manual_seed(0)
    measure(lambda: model(x).sum().backward(), inference=False)
    expected_draw, expected_calls = torch.rand(()), model.calls.clone()

    model.calls.zero_()
    torch.manual_seed(0)
    ledger = measure(lambda: model(x).sum().backward())
    assert torch.rand(()) == expected_draw
    assert model.calls == expected_calls == 1
    assert model.trained[-1] == (False, False, False)
    assert (model.training, model.linear.training, model.norm.training) == (True, True, False)
    assert ledger.inference_peak_bytes is not None


def test_the_inference_pass_runs_on_the_untouched_model() -> None:
    model = nn.Linear(4, 4)
    armed = model.register_forward_hook(lambda *_: torch.zeros(1000))
    events = []

    @contextlib.contextmanager
    def untouched() -> Iterator[None]:
        events.append("disarmed")
        model._forward_hooks.pop(armed.id)
        yield
        events.append("armed")

    x = torch.randn(4, 4)
    ledger = measure(lambda: model(x), untouched=untouched)
    assert events == ["disarmed", "armed"]
    assert ledger.inference_peak_bytes == 16 * FLOAT + 4 * FLOAT + 16 * FLOAT + 16 * FLOAT


class TakesKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.linear = nn.Linear(16, 2)

    def forward(self, *, input_ids: Tensor, mask: Any = None, labels: Any = None) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids) * mask.unsqueeze(-1)
        return {"loss": F.cross_entropy(self.linear(hidden.mean(1)), labels)}


def test_the_model_is_found_with_a_batch_of_keywords() -> None:
    model = TakesKeywords()
    batch = {
        "input_ids": torch.randint(0, 50, (4, 7)),
        "mask": torch.ones(4, 7),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    ledger = measure(lambda: model(**batch)["loss"].backward())
    assert ledger.weight_bytes == weight_bytes(model)
    assert ledger.input_bytes == sum(tensor.nbytes for tensor in batch.values())
    assert ledger.inference_peak_bytes is not None
    assert ledger.inference_peak_bytes > ledger.weight_bytes + ledger.input_bytes
    assert "embedding" in {saved.layer for saved in ledger.saved}


def test_the_model_is_the_module_with_the_most_parameters() -> None:
    model, small, loss = net(), nn.Linear(3, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    ledger = measure(lambda: loss(model(small(x.transpose(1, 3)).transpose(1, 3)), y).backward())
    assert ledger.weight_bytes == weight_bytes(model)
    assert {"0", "1", "3", "Linear", "(loss)"} <= {saved.layer for saved in ledger.saved}


def test_a_model_that_is_wrapped_is_still_measured_by_its_own_names() -> None:
    model = net()
    wrapped = nn.Sequential(nn.Sequential(model))
    x = torch.randn(4, 3, 8, 8)
    ledger = measure(lambda: wrapped(x).sum().backward(), model)
    assert {saved.layer for saved in ledger.saved} == {"0", "1", "3"}
    assert ledger.inference_peak_bytes == measure(lambda: model(x).sum().backward()).inference_peak_bytes


def test_a_step_without_a_model_is_measured_with_a_remark() -> None:
    w, x = torch.zeros(8, 8, requires_grad=True), torch.randn(4, 8)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step() -> None:
        (x @ w).sum().backward()
        optimizer.step()

    ledger = measure(step)
    assert ledger.weight_bytes == w.nbytes
    assert ledger.inference_peak_bytes is None
    assert ledger.saved == (Saved("(outside)", "matmul", "activations", x.nbytes, 1),)
    assert "no module with parameters" in ledger.remarks[0]


def test_a_batch_that_the_step_drops_is_not_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    born = []

    def step() -> None:
        x = torch.ones(1000, 8)
        born.append(weakref.ref(x.untyped_storage()))
        hidden = model[0](x)
        del x
        gone = born[0]() is None
        model[1](hidden)
        assert gone

    measure(step)

    def whole() -> None:
        model(torch.ones(1000, 8))

    ledger = measure(whole)
    gc.collect()
    assert ledger.inference_peak_bytes == weight_bytes(model) + 3 * 1000 * 8 * FLOAT


def test_a_model_that_cannot_run_again_leaves_a_remark() -> None:
    class Once(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise ValueError("no eval here")
            return super().forward(x)

    x = torch.randn(2, 4)
    model = Once(4, 4)
    ledger = measure(lambda: model(x).sum().backward())
    assert ledger.inference_peak_bytes is None
    assert ledger.remarks == ("no inference peak: the model raised ValueError: no eval here",)
    assert model.training


def test_the_inference_pass_has_the_autocast_of_the_step() -> None:
    model, x = nn.Linear(256, 256), torch.randn(64, 256)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).sum()
        loss.backward()

    halves = 2 * (64 * 256 + 256 * 256 + 256 + 64 * 256)  # batch, weight, bias and output in bfloat16
    assert measure(step).inference_peak_bytes == weight_bytes(model) + x.nbytes + halves
