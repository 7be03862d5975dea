"""Training steps whose every tensor is on CUDA; run by test_cuda_fake.py in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.fake_cuda import Waits, fake_cuda


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with fake_cuda(monkeypatch) as waits:
        yield waits


def convolutional() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(),
        nn.Dropout(0.1),
        nn.AvgPool2d(2),
        nn.SiLU(),
        nn.Conv2d(8, 16, 2, stride=2, padding=0),
        nn.Conv2d(16, 16, 2, padding="same"),
        nn.Hardtanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return net, torch.randn(4, 3, 32, 32)


def transformer(kind: str) -> tuple[nn.Module, Any]:
    hf = pytest.importorskip("transformers")
    ids = torch.ones(4, 8, dtype=torch.int64)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "llama":
        config = hf.LlamaConfig(**small, num_key_value_heads=1, vocab_size=40, use_cache=False)
        return hf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
    if kind == "gpt2":
        config = hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=40, use_cache=False)
        return hf.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
    if kind == "bert":
        config = hf.BertConfig(**small, vocab_size=40)
        batch = {"input_ids": ids, "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
        return hf.BertForSequenceClassification(config), batch
    return hf.ViTForImageClassification(hf.ViTConfig(**small, image_size=32, patch_size=8)), torch.randn(4, 3, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"convolutional": convolutional} | {
    kind: lambda kind=kind: transformer(kind) for kind in ("llama", "gpt2", "bert", "vit")
}


def on_cuda(name: str) -> tuple[nn.Module, Any]:
    with torch.device("cuda"):
        return MODELS[name]()


def loss_of(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss
    scores = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device))


def backward(model: nn.Module, batch: Any) -> None:
    loss_of(model(**batch) if isinstance(batch, dict) else model(batch)).backward()


def train(tuner: trady.Tuner, optimizer: torch.optim.Optimizer, batch: Any, epochs: int = 2) -> None:
    tuner.model.train()
    for epoch in range(epochs):
        tuner.resample(epoch)
        backward(tuner.model, batch)
        tuner.clip_gradients()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("convolutional", "none"), ("llama", "all"), ("gpt2", "all"), ("bert", "none"), ("vit", "all"), ("vit", "none")],
)
def test_a_model_trains(name: str, recompute: str) -> None:
    model, batch = on_cuda(name)
    tuner = trady.prepare(model, batch, budget="elements:3000", recompute=recompute, fidelity="8bit")
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters()))
    model.train()
    backward(model, batch)
    trained = [p for p in tuner.parameters() if p.numel()]
    assert len(trained) > 1
    assert all(p.grad is not None and p.grad.device == p.device == torch.device("cuda:0") for p in trained)
    train(tuner, optimizer, batch)
    assert {p.device.type for p in tuner.finish().parameters()} == {"cuda"}


@pytest.mark.parametrize("make", [trady.optim.SGD, trady.optim.AdamW])
def test_updates_are_made_inside_the_backward_pass(make: Any) -> None:
    model, batch = on_cuda("convolutional")
    tuner = trady.prepare(model, batch, budget="elements:3000")
    optimizer = tuner.attach(make(tuner.parameters(), channel_clip=0.1, max_norm=1.0))
    train(tuner, optimizer, batch)
    tuner.finish()


def test_gradients_of_parts_of_a_batch_are_added_up() -> None:
    model, batch = on_cuda("convolutional")
    tuner = trady.prepare(model, batch[:2], budget="elements:3000")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    model.train()
    for part in batch.split(2):
        backward(model, part)
    optimizer.step()
    tuner.finish()


def test_chosen_neurons_train_and_what_has_changed_is_kept() -> None:
    model, batch = on_cuda("convolutional")
    table = trady.plan(model, batch, policy="full").table
    selection = trady.by_output(table, {"0": [1, 3], "4": [2], "10": [0, 5]})
    tuner = trady.prepare(model, batch, policy=Always(selection), budget="elements:100000")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9))
    train(tuner, optimizer, batch)
    assert tuner.selection == selection
    assert tuner.state_dict()["tensors"]
    tuner.finish()


class Always:
    """Draws the same channels every time."""

    name, uses_ranking = "always", False

    def __init__(self, selection: trady.Selection) -> None:
        self.selection = selection

    def select(self, draw: Any) -> trady.Selection:
        return self.selection


@pytest.mark.parametrize("policy", ["fisher", "dynamic-rgn", "velocity"])
def test_policies_measure(policy: str) -> None:
    model, batch = on_cuda("convolutional")
    tuner = trady.prepare(model, batch, budget="elements:3000", policy=policy)
    labels = torch.zeros(4, dtype=torch.int64, device="cuda")
    assert tuner.observation_due
    tuner.observe([(batch, labels)], F.cross_entropy)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9))
    train(tuner, optimizer, batch, epochs=1)
    tuner.finish()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_only_the_norm_that_is_returned_and_a_ranking_that_is_learnt_wait_for_the_device(
    layout: torch.memory_format, waits: Waits
) -> None:
    model, batch = on_cuda("convolutional")
    batch = batch.contiguous(memory_format=layout)
    tuner = trady.prepare(model, batch, budget="elements:3000", ranking="online")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9))
    model.train()
    seen = []
    for epoch in range(2):
        waits.seen.clear()
        tuner.resample(epoch)
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(list(waits.seen))
    assert seen == [["copy to cpu"], []], "once a step, not once a layer, in the first epoch"
    backward(model, batch)
    tuner.clip_gradients()
    assert waits.seen == ["value"]
    tuner.finish()


def test_a_ledger_counts_what_is_on_the_device() -> None:
    model, batch = on_cuda("convolutional")
    tuner = trady.prepare(model, batch, budget="elements:3000")

    def step() -> None:
        backward(model.train(), batch)

    ledger, planned = tuner.ledger(step), tuner.plan.table.saved_bytes(tuner.selection)
    tuner.finish()
    assert ledger.weight_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert ledger.input_bytes == batch.nbytes
    assert ledger.saved_bytes_of("channels") == planned > 0
    assert ledger.inference_peak_bytes is not None


def test_scores_are_not_copied_by_the_lean_loss() -> None:
    scores, target = torch.randn(64, 100, device="cuda", requires_grad=True), torch.zeros(64, device="cuda").long()
    trady.cross_entropy(scores, target).backward()
    assert scores.grad is not None
    assert scores.grad.device == scores.device


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device="cuda") + torch.zeros(2)


def test_backward_runs_on_a_thread_of_the_device() -> None:
    threads = []
    x = torch.zeros(2, device="cuda", requires_grad=True)
    y = x * 1
    y.register_hook(lambda gradient: threads.append(threading.get_ident()))
    y.sum().backward()
    assert threads != [threading.get_ident()]


@pytest.mark.parametrize("name", ["convolutional", "vit"])
def test_the_predicted_peak_is_that_of_the_operations_on_the_device(name: str) -> None:
    model, batch = on_cuda(name)
    tuner = trady.prepare(model, batch, budget="peak:100 MiB")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    model.train()

    def step() -> None:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    ledger, plan = tuner.ledger(step), tuner.plan
    tuner.finish()
    assert plan.predicted_peak_bytes == pytest.approx(ledger.peak_bytes, rel=0.01)
