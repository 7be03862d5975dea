"""A prepared model is exported, copied, saved and called by name as a plain one, or says in one sentence what to do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from trady.errors import ModelError, StateError

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.:DeprecationWarning")


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3),
    )  # fmt: skip


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(recompute: str) -> tuple[nn.Module, trady.Tuner, torch.optim.Optimizer]:
    """A model that is prepared, and has made a step."""
    model = build()
    tuner = trady.prepare(model, X, budget="4 MiB", policy="dynamic-random", recompute=recompute)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    step(model, optimizer)
    return model, tuner, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    F.cross_entropy(model(X), torch.arange(4) % 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def _saved(model: nn.Module) -> Tensor:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    out: Tensor = torch.load(file, weights_only=False)(X)
    return out


def _loaded(model: nn.Module) -> Tensor:
    plain = build().eval()
    plain.load_state_dict(model.state_dict())
    out: Tensor = plain(X)
    return out


def _other_weights(model: nn.Module) -> Tensor:
    out: Tensor = torch.func.functional_call(model, dict(model.state_dict()), (X,))
    return out


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "called": lambda model: model(X),
    "jit.trace": lambda model: torch.jit.trace(model, X)(X),
    "export": lambda model: torch.export.export(model, (X,)).module()(X),
    "export, strict": lambda model: torch.export.export(model, (X,), strict=True).module()(X),
    "fx": lambda model: torch.fx.symbolic_trace(model)(X),
    "deepcopy": lambda model: copy.deepcopy(model)(X),
    "torch.save": _saved,
    "state_dict": _loaded,
    "functional_call": _other_weights,
    "vmap": lambda model: torch.vmap(lambda x: model(x.unsqueeze(0)).squeeze(0))(X),
    "inference_mode": lambda model: torch.inference_mode()(model)(X).clone(),
}


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("way", WAYS)
def test_a_prepared_model_gives_what_the_plain_one_gives(way: str, recompute: str) -> None:
    model, tuner, optimizer = trained(recompute)
    model.eval()
    with tuner.untouched(), torch.no_grad():
        expected = model(X)
    with torch.no_grad():
        torch.testing.assert_close(WAYS[way](model), expected, rtol=1e-5, atol=1e-6)
    model.train()
    weights = copy.deepcopy(model.state_dict())
    step(model, optimizer)  # it still trains
    assert any(not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("way", ["export", "export, strict"])
def test_a_model_is_exported_with_gradients_on_too(way: str) -> None:
    model, tuner, _ = trained("none")
    model.eval()
    with tuner.untouched():
        torch.testing.assert_close(WAYS[way](model), model(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(WAYS[way](model), model(X), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_says_so_in_one_sentence() -> None:
    model, _, optimizer = trained("none")
    with pytest.raises(ModelError, match=r"torch.jit.script was called with a prepared model: call tuner.finish\(\)"):
        torch.jit.script(model)
    with pytest.raises(ModelError, match=r"torch\.func's vmap, grad and the like were put around a prepared model"):
        WAYS["vmap"](model)
    with pytest.raises(StateError, match="moved or replaced after the model had been prepared"):
        _other_weights(model)
    step(model, optimizer)
