"""Segments that are recomputed: passes that are repeated, interrupted, or in another mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import trady
from tests.against_dense import dense_gradients, gradients
from tests.models import normal, relative_error, seeded
from tests.recomputed_models import TokenBlock, call, loss_of, recomputed_model, tokens
from tests.recomputing import anew, close, worst

pytestmark = pytest.mark.usefixtures("one_sample_a_part")


def test_autocast_is_as_near_to_float32_as_pytorch() -> None:
    for name in ("BERT", "GPT-2, loss", "ViT, by hand", "Llama"):
        model, batch = recomputed_model(name, torch.float32)
        exact = copy.deepcopy(model)
        tuner = anew(model, batch)

        def loss(network: nn.Module, batch: Any = batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(batch)(network)

        plain = dense_gradients(exact, tuner, loss)
        reference = dense_gradients(exact, tuner, loss_of(batch))
        assert torch.is_autocast_enabled("cpu") is False
        loss(model).backward()
        found = gradients(tuner)
        for parameter, gradient in reference.items():
            limit = 2 * relative_error(plain[parameter], gradient) + 1e-2
            assert relative_error(found[parameter], gradient) < limit, (name, parameter)
        tuner.finish()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["GPT-2, loss", "Swin"])
def test_passes_without_gradients_between_passes_with(name: str, train: bool, context: Any) -> None:
    model, batch = recomputed_model(name)
    plain = copy.deepcopy(model)
    tuner = anew(model, batch)
    for _ in range(2):
        with context():
            model.train(train)
            found, expected = loss_of(batch)(model), loss_of(batch)(plain)
            assert not found.requires_grad
            assert relative_error(found.clone(), expected.clone()) < min(close(name), 1e-6)
        model.train()
        assert worst(model, tuner, loss_of(batch)) < close(name)
    tuner.finish()


def test_gradients_accumulate_over_batches() -> None:
    name = "Llama, loss"
    model, batch = recomputed_model(name)
    other = {"input_ids": tokens(3, 6, seed=5), "labels": tokens(3, 6, seed=6)}
    tuner = anew(model, batch)

    def both(network: nn.Module) -> Tensor:
        return loss_of(batch)(network) + loss_of(other)(network)

    expected = dense_gradients(model, tuner, both)
    loss_of(batch)(model).backward()
    loss_of(other)(model).backward()
    found = gradients(tuner)
    assert all(relative_error(found[n], g) < close(name) for n, g in expected.items())
    assert worst(model, tuner, both) < close(name)  # two forward passes, one backward pass
    first, second = loss_of(batch)(model), loss_of(other)(model)
    for parameter in tuner.parameters():
        parameter.grad = None
    second.backward()
    first.backward()
    found = gradients(tuner)
    assert all(relative_error(found[n], g) < close(name) for n, g in expected.items())
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "GPT-2, loss"])
def test_two_backward_passes_through_one_graph(name: str) -> None:
    model, batch = recomputed_model(name)
    tuner = anew(model, batch)
    expected = dense_gradients(model, tuner, loss_of(batch))
    loss = loss_of(batch)(model)
    loss.backward(retain_graph=True)
    loss.backward()
    found = gradients(tuner)
    assert all(relative_error(found[n], 2 * g) < close(name) for n, g in expected.items())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    tuner.finish()


def test_gradients_of_the_inputs() -> None:
    model, x = recomputed_model("ViT, by hand")
    tuner = anew(model, x)
    x.requires_grad_(True)
    dense = copy.deepcopy(model)
    (expected,) = torch.autograd.grad(loss_of(x)(dense), x)
    loss_of(x)(model).backward()
    assert relative_error(x.grad, expected) < 1e-10
    tuner.finish()


class Fails(nn.Module):
    """Raises inside of a segment when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(8, 32), TokenBlock(32, 4, 0.0), nn.Linear(32, 3)
        self.error: BaseException | None = None
        self.block.proj.register_forward_pre_hook(self._fail)

    def _fail(self, module: nn.Module, args: Any) -> None:
        if self.error is not None:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.first(x)).mean(1))


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_forward_that_raises_inside_of_a_segment_leaves_the_next_one_as_it_was(error: BaseException) -> None:
    model, x = seeded(Fails).double(), normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, x)
    assert tuner.plan.recomputable > 0
    for _ in range(2):
        model.error = error
        with pytest.raises(type(error)):
            model(x)
        model.error = None
        assert torch.equal(F.gelu(torch.zeros(2)), torch.zeros(2))
        assert worst(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()


def test_a_backward_pass_that_raises_inside_of_a_segment_leaves_the_next_one_as_it_was() -> None:
    model, batch = recomputed_model("BERT")
    tuner = anew(model, batch)
    plain = torch.get_rng_state()
    loss = loss_of(batch)(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    tuner._armed.on_gradient.append(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    tuner._armed.on_gradient.remove(fail)
    assert _get_current_function_mode_stack() == []
    assert torch.equal(plain, torch.get_rng_state())
    assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


def test_submodules_called_alone() -> None:
    model, x = recomputed_model("ViT, by hand")
    plain = copy.deepcopy(model)
    tuner = anew(model, x)
    hidden = normal(4, 10, 32, dtype=torch.float64)
    for path in ("blocks", "blocks.0", "blocks.1", "blocks.0.fc1", "norm"):
        expected = plain.get_submodule(path)(hidden)
        assert relative_error(model.get_submodule(path)(hidden), expected) < 1e-12, path
        longer = normal(2, 13, 32, dtype=torch.float64)
        assert relative_error(model.get_submodule(path)(longer), plain.get_submodule(path)(longer)) < 1e-12, path

    def loss(network: Any) -> Tensor:
        return network.blocks[1](network.blocks[0](hidden)).square().sum() + network(x).sum()

    assert worst(model, tuner, loss) < 1e-10
    tuner.finish()


def test_a_copy_is_the_plain_model() -> None:
    model, batch = recomputed_model("BERT")
    expected = call(copy.deepcopy(model), batch).logits
    tuner = anew(model, batch)
    loss_of(batch)(model).backward()
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin, batch).logits, expected)
    tuner.finish()
    assert torch.equal(call(model, batch).logits, expected)


def test_a_backward_pass_after_channels_were_drawn_anew_is_refused() -> None:
    model, batch = recomputed_model("BERT")
    table = trady.plan(model, batch, policy="full").table
    elements = sum(layer.channels * layer.elements for layer in table) // 10
    tuner = trady.prepare(model, batch, budget=f"elements:{elements}", policy="dynamic-random", recompute="all")
    loss = loss_of(batch)(model)
    tuner.resample(1)
    with pytest.raises(trady.errors.StateError, match="drawn again"):
        loss.backward()
    assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


@pytest.mark.parametrize("what", ["weight", "channels", "norm"])
def test_a_parameter_that_changes_between_forward_and_backward_is_refused(what: str) -> None:
    model, x = recomputed_model("ViT, by hand")
    tuner = anew(model, x)
    loss = loss_of(x)(model)
    with torch.no_grad():
        if what == "weight":
            model.blocks[0].fc2.weight.mul_(1.1)
        elif what == "norm":
            model.blocks[1].norm2.weight.mul_(1.1)
        else:
            dict(tuner.named_parameters())["blocks.0.fc1.weight.channels"].mul_(1.1)
            model(x)  # writes it back
    with pytest.raises(RuntimeError, match=r"changed|modified"):
        loss.backward()
    tuner.finish()
