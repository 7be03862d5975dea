"""Loops that ask a model, or a module around it, for parameters and gradients, where weights are stored quantised."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trady
from tests.idioms import OPTIMIZERS, ZEROS, Wrapper, Zero
from tests.models import relative_error
from tests.quantised_network import KINDS, X, Y, loss, network, quantised, quantised_layers
from trady.errors import StateError
from trady.quantized.linear import layer_at

pytestmark = [
    # Quantisers look at parts of PyTorch that PyTorch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

ONE_OF_EACH = ["torchao-8", "bitsandbytes-8", "bitsandbytes-4"]

Parameters = Callable[[nn.Module, trady.Tuner], Iterable[Any]]


def start(kind: str, model: Any = None, **options: Any) -> tuple[nn.Module, trady.Tuner]:
    model = quantised(kind, network()) if model is None else model
    asked = {"budget": "elements:4000", "policy": "dynamic-random", **options}
    tuner = trady.prepare(model, X, **asked)
    assert len(quantised_layers(tuner)) == 6
    return model, tuner


def loop(
    caller: nn.Module,
    tuner: trady.Tuner,
    optimizer: torch.optim.Optimizer,
    zero: Zero = lambda model, optimizer: optimizer.zero_grad(),
    clip: Callable[[], Any] | None = None,
) -> dict[str, Tensor]:
    """Train two epochs; return what has changed."""
    for epoch in range(2):
        tuner.resample(epoch)
        for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):
            (10 * loss(x, y)(caller)).backward()
            if clip is not None:
                clip()
            optimizer.step()
            zero(caller, optimizer)
    return tuner.delta()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any("blocks" in name for name in one)
    for name, value in one.items():
        assert relative_error(value, other[name]) < 1e-5, name


def reference(kind: str, name: str, limit: float | None = None) -> dict[str, Tensor]:
    model, tuner = start(kind)
    optimizer = tuner.attach(OPTIMIZERS[name](list(tuner.parameters())))
    clip = None if limit is None else lambda: nn.utils.clip_grad_norm_(list(tuner.parameters()), limit)
    return loop(model, tuner, optimizer, clip=clip)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_through_a_module_around_the_model(kind: str) -> None:
    model, tuner = start(kind)
    around = Wrapper(model)
    optimizer = tuner.attach(OPTIMIZERS["momentum"](list(tuner.parameters())))
    (100 * loss()(around)).backward()
    before = nn.utils.get_total_norm([p.grad for p in tuner.parameters() if p.grad is not None])
    told = nn.utils.clip_grad_norm_(around.parameters(), 0.5)
    after = nn.utils.get_total_norm([p.grad for p in tuner.parameters() if p.grad is not None])
    assert float(told) == pytest.approx(float(before), rel=1e-5)
    assert float(after) == pytest.approx(0.5, rel=1e-4)
    optimizer.zero_grad()
    found = loop(around, tuner, optimizer, clip=lambda: nn.utils.clip_grad_norm_(around.parameters(), 0.5))
    same(found, reference(kind, "momentum", 0.5))


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_are_dropped_through_a_module_around_the_model(kind: str, zero: Zero) -> None:
    model, tuner = start(kind)
    optimizer = tuner.attach(OPTIMIZERS["momentum"](list(tuner.parameters())))
    same(loop(Wrapper(model), tuner, optimizer, zero), reference(kind, "momentum"))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_are_dropped_where_no_head_shows_it(kind: str) -> None:
    model, tuner = start(kind, head=None)
    around = Wrapper(model)
    loss()(around).backward()
    around.zero_grad()
    assert all(p.grad is None for p in tuner.parameters())


PARAMETERS: dict[str, Parameters] = {
    "the model": lambda model, tuner: model.parameters(),
    "those that require a gradient": lambda model, tuner: (p for p in model.parameters() if p.requires_grad),
    "a module around it": lambda model, tuner: Wrapper(model).parameters(),
}


@pytest.mark.parametrize("name", ["AdamW", "SGD in backward"])
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_an_optimizer_over_parameters_trains_the_channels(kind: str, parameters: Parameters, name: str) -> None:
    model, tuner = start(kind)
    optimizer = tuner.attach(OPTIMIZERS[name](list(parameters(model, tuner))))
    same(loop(model, tuner, optimizer), reference(kind, name))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_the_gradient_of_a_quantised_weight_has_the_shape_of_what_it_stands_for(kind: str) -> None:
    model, tuner = start(kind)
    compact = dict(tuner.named_parameters())
    loss()(model).backward()
    for name in quantised_layers(tuner):
        weight, layer = model.get_parameter(f"{name}.weight"), layer_at(model.get_submodule(name))
        assert layer is not None
        values = compact[f"{name}.weight.channels"].grad
        if values is None:
            continue
        gradient: Any = weight.grad
        assert gradient.shape == layer.shape
        assert weight.requires_grad
        assert torch.equal(gradient.dense()[:, torch.tensor(tuner.selection[name])].t(), values)
        weight.grad = gradient.dense() * 2
        again = compact[f"{name}.weight.channels"].grad
        assert again is not None
        assert torch.equal(again, 2 * values)
    assert any(model.get_parameter(f"{name}.weight").grad is not None for name in quantised_layers(tuner))


PENALTIES: dict[str, Callable[[Any], Tensor]] = {
    "its square": lambda weight: (weight**2).sum(),
    "its norm": lambda weight: torch.linalg.vector_norm(weight.float()),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_penalty_that_would_have_no_gradient_is_refused(kind: str, penalty: Callable[[Any], Tensor]) -> None:
    model, tuner = start(kind)
    with pytest.raises(StateError, match=r"is stored as \w+ has no gradient: take a penalty of tuner.parameters\(\)"):
        sum(penalty(p) for p in model.parameters() if p.requires_grad)
    (loss()(model) + sum(penalty(p) for p in tuner.parameters())).backward()
    assert all(p.grad is not None for p in tuner.parameters() if len(p))


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(p) for name, p in model.named_parameters()}


def written_and_read(model: nn.Module, kind: str) -> nn.Module:
    """What a file has of a model; torchao's tensors cannot be pickled with their module."""
    if kind.startswith("bitsandbytes"):
        again: nn.Module = pickle.loads(pickle.dumps(model))  # noqa: S301 - made here
        return again
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other: nn.Module = network()
    other.load_state_dict(torch.load(file), assign=True)
    return other


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_quantised_weight_is_itself_in_copies_files_and_in_print(kind: str) -> None:
    model = quantised(kind, network())
    model(X)  # bitsandbytes has its numbers in their place after a first pass
    weight = model.get_parameter("blocks.0.up.weight")
    before, read, shown = kinds(model), kinds(written_and_read(model, kind)), repr(weight)
    model, tuner = start(kind, model)
    expected = model(X)
    assert repr(weight) == shown
    copied, again = copy.deepcopy(model), written_and_read(model, kind)
    tuner.finish()
    assert kinds(copied) == kinds(model) == before
    assert kinds(again) == read
    for one in (copied, again):
        torch.testing.assert_close(one(X), expected)
    assert model.get_parameter("blocks.0.up.weight") is weight
    assert not weight.requires_grad


@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-8"])  # one in 4 bits holds its module, and that the tuner
def test_a_quantised_weight_whose_tuner_is_gone_is_a_plain_one(kind: str) -> None:
    model, tuner = start(kind)
    weight = model.get_parameter("blocks.0.up.weight")
    del tuner, model
    gc.collect()
    assert weight.grad is None
    assert not weight.requires_grad
