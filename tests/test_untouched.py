"""What trady runs for itself leaves no mark: on weights, in Python, on random numbers (trady/model/untouched.py)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.leaving_marks import BATCHES, MODELS, WIDTH, X, Y
from trady.model.untouched import untouched
from trady.trace.forward import trace_forward

pytestmark = [
    # Quantisers and torch.compile look at parts of PyTorch that PyTorch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::trady.TradyWarning"),
]


# -- all that there is to see --------------------------------------------------------------------------


class Picture:
    """All that a model and the surroundings are, by path: identities, and values of their own."""

    def __init__(self, *roots: Any) -> None:
        self.entries: dict[str, Any] = {}
        self._alive: list[Any] = []
        self._seen: set[int] = set()
        for place, root in enumerate(roots):
            self._look(f"{place}", root)
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self.entries["random numbers"] = [repr(python), repr(numpy), *torch.get_rng_state().tolist()]
        self.entries["switches"] = [torch.get_default_dtype(), torch.is_grad_enabled()]

    def _look(self, path: str, value: Any) -> None:
        self.entries[path] = (type(value), id(value))
        self._alive.append(value)
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if value.is_leaf:
                self._look(f"{path}.grad", value.grad)
            self.entries[f"{path}!"] = (value.shape, value.stride(), value.requires_grad, value.dtype, value.device)
            if hasattr(type(value), "__tensor_flatten__"):
                flatten: Any = value
                for name in flatten.__tensor_flatten__()[0]:
                    self._look(f"{path}.{name}", getattr(value, name))
            else:
                self.entries[f"{path}="] = None if value.is_meta else value.detach().clone().reshape(-1).tolist()
        elif isinstance(value, (torch.Generator, random.Random, np.random.Generator)):
            self.entries[f"{path}="] = _state(value)
        elif isinstance(value, dict):
            for place, (key, entry) in enumerate(value.items()):
                self.entries[f"{path}[{place}]"] = repr(key)
                self._look(f"{path}[{place}]={key!r}", entry)
        elif isinstance(value, (list, tuple, deque)):
            for place, entry in enumerate(value):
                self._look(f"{path}[{place}]", entry)
        elif isinstance(value, (set, frozenset)):
            self.entries[f"{path}="] = sorted(map(repr, value))
        elif hasattr(value, "__self__") and not isinstance(value, type(len)):
            self._look(f"{path}.__self__", value.__self__)
        mine = isinstance(value, (nn.Module, Tensor, SimpleNamespace)) or type(value).__module__ == __name__
        if mine:
            for name, entry in getattr(value, "__dict__", {}).items():
                self._look(f"{path}.{name}", entry)
            for name in (n for n in dir(type(value)) if n in ("count", "late", "_Slotted__hidden")):
                self._look(f"{path}.{name}", getattr(value, name, "missing"))

    def differences(self, other: Picture) -> list[str]:
        paths = [*self.entries, *(path for path in other.entries if path not in self.entries)]
        return [path for path in paths if self.entries.get(path) != other.entries.get(path)]


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return generator.getstate() if isinstance(generator, random.Random) else repr(generator.bit_generator.state)


@pytest.mark.parametrize("name", MODELS)
def test_a_picture_shows_what_a_forward_pass_leaves(name: str) -> None:
    """The check of the checks: without the context, nearly all of these models show that they have run."""
    model, x = MODELS[name](), X.clone()
    before = Picture(model, x)
    model.eval() if model.training else model.train()
    model(x)
    assert before.differences(Picture(model, x))
    torch.set_default_dtype(torch.float32)


# -- ways in -------------------------------------------------------------------------------------------


def plan(model: nn.Module, x: Tensor) -> None:
    trady.plan(model, x, budget="peak:1 MiB", policy="dynamic-random")


def prepare(model: nn.Module, x: Tensor) -> None:
    tuner = trady.prepare(model, x, budget="peak:1 MiB", policy="dynamic-random", seed=1)
    assert tuner.plan.table.names
    assert tuner.finish() is model


def trace(model: nn.Module, x: Tensor) -> None:
    for training in (True, False, None):
        trace_forward(getattr(model, "_orig_mod", model), x, training=training)


def measure(model: nn.Module, x: Tensor) -> None:
    trady.rank(model, [(x, Y), (x, Y)], F.cross_entropy, budget="elements:600")


@pytest.mark.parametrize("way", [plan, prepare, trace, measure])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_it_was(name: str, way: Callable[[nn.Module, Tensor], None]) -> None:
    model, x = MODELS[name](), X.clone()
    before = Picture(model, x)
    way(model, x)
    assert not before.differences(Picture(model, x))


@pytest.mark.parametrize("policy", ["fisher", "velocity", "static-rgn"])
@pytest.mark.parametrize("name", MODELS)
def test_observing_leaves_a_prepared_model_as_it_was(name: str, policy: str) -> None:
    model, batches = MODELS[name](), [(x.clone(), y) for x, y in BATCHES]
    wanted: Any = policy if policy != "static-rgn" else _Gradients()
    tuner = trady.prepare(model, batches[0][0], budget="elements:600", policy=wanted)
    tuner.observe(batches, F.cross_entropy)
    tuner.resample(0)
    before = Picture(model, batches)
    tuner.observe(batches, F.cross_entropy)
    tuner.sweeper(F.cross_entropy).visit(batches[0], lambda name, channels, gradient: None, seed=5)
    assert not before.differences(Picture(model, batches))
    tuner.finish()


class _Gradients:
    """Draws what has the largest gradient."""

    name, uses_ranking = "largest-gradients", False
    needs = trady.policies.Needs(("gradients",), each_epoch=True)

    def select(self, draw: trady.policies.Draw) -> Any:
        return trady.policies.get_policy("dynamic-random").select(draw)


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_that_a_ledger_is_held_against_leaves_no_mark(name: str) -> None:
    model, x = MODELS[name](), X.clone()
    tuner = trady.prepare(model, x, budget="elements:600", policy="dynamic-random")
    pictures = []

    def step() -> None:
        F.cross_entropy(model(x), Y).backward()
        pictures.append(Picture(model, x))

    ledger = tuner.ledger(step)
    assert ledger.inference_peak_bytes
    assert not pictures[0].differences(Picture(model, x))
    torch.set_default_dtype(torch.float32)


#: The others have quantised weights, look at values, or have run before.
WITHOUT_MEMORY = [
    "an adapter, in training mode",
    "an adapter, merged",
    "an adapter in a new parameter, merged",
    "counters",
    "caches",
    "objects",
    "buffers",
    "random numbers",
    "rescaled weights",
    "tied weights",
    "compiled",
    "globals and the batch",
    "a lock and closures",
]


@pytest.mark.parametrize("way", [plan, prepare, trace])
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_a_model_without_memory_is_as_it_was(name: str, way: Callable[[nn.Module, Tensor], None]) -> None:
    model, x = MODELS[name]().to("meta"), X.to("meta")
    before = Picture(model, x)
    way(model, x)
    assert not before.differences(Picture(model, x))


# -- what it costs -------------------------------------------------------------------------------------


def test_a_trace_copies_no_weight() -> None:
    """Switched, traced and put back, a model with an adapter takes not a byte that grows with its weights."""
    from trady.memory.live import LiveBytes

    model = MODELS["an adapter, merged"]()
    with LiveBytes() as live:
        trace_forward(model, X, training=True)
    assert not [storage for storage in live.log if storage.device != "meta" and storage.nbytes >= WIDTH * WIDTH * 4]


def test_a_trace_switches_modes_as_the_model_does() -> None:
    """The adapter is called in training mode only, also where the model was merged before."""
    model: Any = MODELS["an adapter, merged"]()
    for training in (True, False):
        found = {id(p) for call in trace_forward(model, X, training=training).calls for p in call.parameters}
        assert (id(model.middle.up) in found) is training
        assert id(model.middle.weight) in found


def test_what_is_written_is_copied_once() -> None:
    buffer, other = torch.zeros(100), torch.zeros(100)
    with untouched([buffer, other]) as writes:
        buffer[:50].add_(1)
        buffer[50:].add_(1)
        torch.add(buffer, 1, out=buffer)
        assert len(writes._copies) == 1
    assert not buffer.any()


def test_an_error_inside_is_undone_too() -> None:
    model = MODELS["buffers"]()
    before = Picture(model)

    def broken() -> None:
        with untouched(model):
            model(X)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert not before.differences(Picture(model))


def test_statistics_of_a_normalisation_are_put_back() -> None:
    """Its kernel writes into them without saying so."""
    model = nn.BatchNorm1d(WIDTH)
    before = Picture(model)
    with untouched(model):
        model(X)
        assert before.differences(Picture(model))
    assert not before.differences(Picture(model))
