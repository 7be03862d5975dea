"""Compiled models: they train uncompiled as long as they are prepared, and are compiled again afterwards."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trady
from tests.against_dense import armed, dense_gradients, gradients
from tests.models import Residual, normal, relative_error, same, seeded, snapshot
from trady.errors import BudgetError, ModelError, TradyWarning

pytestmark = [
    # torch.compile looks at parts of PyTorch that PyTorch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    # It asks every tensor that it is given whether it has a gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

X = normal(2, 3, 9, 9, dtype=torch.float64)


class Compiler:
    """A backend that counts how often what it has compiled is run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


COMPILER = Compiler()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    COMPILER.runs = 0
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def backward(model: nn.Module) -> None:
    squares(model).backward()


def around(model: Any) -> Any:
    return torch.compile(model, backend=COMPILER)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=COMPILER)
    return model


def inside(model: Any) -> Any:
    model.blocks[0] = torch.compile(model.blocks[0], backend=COMPILER)
    return model


def inside_in_place(model: Any) -> Any:
    for block in model.blocks:
        block.compile(backend=COMPILER)
    return model


def its_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=COMPILER)
    return model


FORMS = [around, in_place, inside, inside_in_place, its_forward]


def plain() -> nn.Module:
    return seeded(Residual).double().train()


def squares(model: nn.Module) -> Tensor:
    return model(X).square().sum()


def prepared(model: nn.Module, **options: Any) -> trady.Tuner:
    """A compiled model comes with a remark."""
    with pytest.warns(TradyWarning, match=r"compiled again after tuner\.finish"):
        return armed(model, X, **options)


def without_wrappers(names: Any) -> list[str]:
    return [name.replace("_orig_mod.", "") for name in names]


# -- a compiled model is accepted --------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", FORMS)
def test_a_compiled_model_trains_uncompiled_and_is_compiled_again(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = compiled(plain())
    keys, printed = list(model.state_dict()), repr(model)
    tuner = prepared(model)
    reference = armed(plain(), X)
    assert tuner.model is model
    expected = dense_gradients(plain(), reference, squares)
    squares(model).backward()
    found = gradients(tuner)
    assert without_wrappers(found) == list(expected)
    for gradient, wanted in zip(found.values(), expected.values(), strict=True):
        assert relative_error(gradient, wanted) < 1e-10
    assert list(model.state_dict()) == keys
    assert COMPILER.runs == 0

    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01)).step()
    trained = {name.replace("_orig_mod.", ""): t.clone() for name, t in model.state_dict().items()}
    assert tuner.finish() is model
    assert (list(model.state_dict()), repr(model)) == (keys, printed)
    alike = plain()
    alike.load_state_dict(trained)
    assert not torch.equal(trained["stem.0.weight"], plain().state_dict()["stem.0.weight"])
    assert relative_error(model.eval()(X), alike.eval()(X)) < 1e-10
    assert COMPILER.runs > 0


@pytest.mark.parametrize("compiled", FORMS)
def test_other_channels_of_a_compiled_model_have_their_own_gradients(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    tuner = prepared(compiled(plain()), budget="elements:2000", policy="dynamic-random")
    reference = trady.prepare(plain(), X, budget="elements:2000", policy="dynamic-random")
    drawn = set()
    for epoch in range(3):
        drawn.add(tuner.resample(epoch).digest)
        reference.resample(epoch)
        for one in (tuner, reference):
            for parameter in one.parameters():
                parameter.grad = None
        squares(tuner.model).backward()
        expected = dense_gradients(plain(), reference, squares)
        found = gradients(tuner)
        assert without_wrappers(found) == list(expected)
        for gradient, wanted in zip(found.values(), expected.values(), strict=True):
            assert relative_error(gradient, wanted) < 1e-10
    assert len(drawn) == 3


@pytest.mark.parametrize("compiled", FORMS)
def test_plan_and_memory_of_a_compiled_model_are_those_of_the_plain_one(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    options: dict[str, Any] = {"budget": "peak:60 KiB", "policy": "dynamic-random"}
    reference = trady.prepare(plain(), X, **options)
    tuner = prepared(compiled(plain()), **options)
    assert tuner.plan.predicted_peak_bytes == reference.plan.predicted_peak_bytes
    assert tuner.selection.count == reference.selection.count
    ours, theirs = (t.ledger(partial(backward, t.model)) for t in (tuner, reference))
    assert (ours.peak_bytes, ours.saved_bytes) == (theirs.peak_bytes, theirs.saved_bytes)
    assert ours.inference_peak_bytes == theirs.inference_peak_bytes


def test_a_plan_copies_no_compiler() -> None:
    backend = Compiler()
    vars(backend)["lock"] = threading.Lock()  # it cannot be copied
    model: Any = torch.compile(plain(), backend=backend)
    model.blocks[0] = torch.compile(model.blocks[0], backend=backend)
    options: dict[str, Any] = {"budget": "peak:60 KiB", "policy": "dynamic-random"}
    assert (
        trady.plan(model, X, **options).predicted_peak_bytes == trady.plan(plain(), X, **options).predicted_peak_bytes
    )
    model(X)
    assert backend.runs > 0


def test_names_are_those_of_the_model_that_was_compiled() -> None:
    tuner = prepared(around(plain()), head="head")
    assert tuner.plan.table.names == armed(plain(), X, head="head").plan.table.names


@pytest.mark.parametrize("base", [lambda m: m, around, inside], ids=["plain", "around", "inside"])
@pytest.mark.parametrize("compiled", FORMS)
def test_a_delta_fits_the_base_model_compiled_or_not(
    compiled: Callable[[nn.Module], nn.Module], base: Callable[[nn.Module], nn.Module]
) -> None:
    tuner = prepared(compiled(plain()))
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    squares(tuner.model).backward()
    optimizer.step()
    delta = tuner.delta()
    assert not any("_orig_mod" in name for name in delta)
    trained = tuner.finish()
    tuned = trady.apply_delta(base(plain()), delta)
    assert same(*({n.replace("_orig_mod.", ""): t for n, t in snapshot(m).items()} for m in (tuned, trained)))


def test_a_compiled_model_goes_on_from_the_state_of_a_plain_one() -> None:
    first = armed(plain(), X)
    optimizer = first.attach(torch.optim.SGD(first.parameters(), lr=0.01))
    squares(first.model).backward()
    optimizer.step()
    second = prepared(around(plain()))
    second.load_state_dict(first.state_dict())
    assert same(snapshot(second.finish().get_submodule("_orig_mod")), snapshot(first.finish()))


@pytest.mark.parametrize("compiled", FORMS)
def test_a_compiled_model_is_ranked_as_the_plain_one(compiled: Callable[[nn.Module], nn.Module]) -> None:
    def rank(model: nn.Module) -> trady.LayerRanking:
        return trady.rank(model, [(X, torch.zeros(2, dtype=torch.int64))], nn.functional.cross_entropy)

    model = compiled(plain())
    ranking, expected = rank(model), rank(plain())
    assert list(ranking.scores.values()) == pytest.approx(list(expected.scores.values()))
    model.eval()(X)
    assert COMPILER.runs > 0


# -- code that compiles itself -----------------------------------------------------------------------------------


@torch.compile(backend=COMPILER)
def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(gate(self.first(x)))


def test_functions_that_compile_themselves_run_uncompiled_inside_a_prepared_model() -> None:
    x, model = normal(4, 6), seeded(Gated)
    tuner = armed(model, x)
    expected = dense_gradients(seeded(Gated), tuner, lambda net: net(x).square().sum())
    COMPILER.runs = 0
    model(x).square().sum().backward()
    assert COMPILER.runs == 0
    for name, gradient in gradients(tuner).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    gate(x)
    assert COMPILER.runs == 1
    tuner.finish()(x)
    assert COMPILER.runs > 1


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=["an error", "Ctrl-C"])
def test_compilers_are_on_again_after_a_forward_that_was_broken_off(error: BaseException) -> None:
    x, model = normal(4, 6), seeded(Gated)
    tuner = armed(model, x)

    def raises(*_: Any) -> None:
        raise error

    handle = model.head.register_forward_hook(raises)
    with suppress(ValueError, KeyboardInterrupt):
        model(x)
    handle.remove()
    model(x).sum().backward()
    COMPILER.runs = 0
    gate(x)
    assert COMPILER.runs == 1
    tuner.finish()


def test_a_function_that_is_compiled_for_the_first_time_inside_the_traced_forward_is_accepted() -> None:
    code = """
import sys, torch, trady
from torch import nn
class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
    def forward(self, x):
        return self.head(torch.compile(torch.nn.functional.gelu, backend="eager")(self.first(x)))
model = Lazy()
assert "torch._dynamo" not in sys.modules
tuner = trady.prepare(model, torch.ones(2, 6), budget="elements:50", policy="dynamic-random")
model(torch.ones(2, 6)).sum().backward()
print(sum(p.grad is not None for p in tuner.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2


# -- what is refused, and what is left alone ---------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [around, in_place])
def test_a_prepared_model_that_is_compiled_says_so_and_trains_with_compilers_off(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    model = plain()
    tuner = armed(model, X)
    late = compiled(model)
    with pytest.raises(ModelError, match=r"compile the model before trady\.prepare"):
        late(X)
    torch.compiler.set_stance("force_eager")
    expected = dense_gradients(plain(), tuner, squares)
    squares(late).backward()
    for name, gradient in gradients(tuner).items():
        assert relative_error(gradient, expected[name]) < 1e-10, name
    torch.compiler.set_stance("default")
    tuner.finish()
    assert relative_error(late.eval()(X), plain().eval()(X)) < 1e-10
    assert COMPILER.runs > 0


def test_a_compiled_step_around_a_prepared_model_is_refused_unless_it_leaves_the_model_out() -> None:
    model = plain()
    tuner = armed(model, X)

    @torch.compile(backend=COMPILER)
    def step(x: Tensor) -> Tensor:
        return model(x).square().sum()

    with pytest.raises(ModelError, match=r"torch\.compiler\.disable"):
        step(X)
    outside = torch.compiler.disable(model)

    @torch.compile(backend=COMPILER)
    def other_step(x: Tensor) -> Tensor:
        return outside(x).square().sum()

    expected = dense_gradients(plain(), tuner, squares)
    other_step(X).backward()
    for name, gradient in gradients(tuner).items():
        assert relative_error(gradient, expected[name]) < 1e-10, name


@pytest.mark.parametrize("compiled", FORMS)
def test_a_refused_budget_leaves_a_model_compiled(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = compiled(plain())
    with pytest.raises(BudgetError):
        trady.prepare(model, X, budget="peak:1 KiB", policy="dynamic-random")
    model(X)
    assert COMPILER.runs > 0


@pytest.mark.parametrize("compiled", FORMS)
def test_a_copy_of_a_prepared_model_is_a_plain_model_that_runs(compiled: Callable[[nn.Module], nn.Module]) -> None:
    tuner = prepared(compiled(plain()))
    copied = copy.deepcopy(tuner.model)
    assert relative_error(copied.eval()(X), plain().eval()(X)) < 1e-10
    squares(tuner.model).backward()
    assert gradients(tuner)


def test_a_model_that_was_compiled_anew_meanwhile_keeps_the_newer_form() -> None:
    model = in_place(plain())
    tuner = prepared(model)
    newer = Compiler()
    model.compile(backend=newer)
    tuner.finish()
    model(X)
    assert (COMPILER.runs, newer.runs > 0) == (0, True)


def test_a_whole_run_writes_a_compiled_model_under_its_plain_names(tmp_path: Path) -> None:
    data: Any = [(image, label % 5) for label, image in enumerate(normal(8, 3, 9, 9))]
    settings: dict[str, Any] = {"budget": "elements:2000", "epochs": 1, "batch_size": 4, "progress": False, "lr": 0.01}
    with pytest.warns(TradyWarning, match="uncompiled"):
        result = trady.finetune(around(seeded(Residual)), data, data, out=tmp_path / "a", **settings)
    reference = trady.finetune(seeded(Residual), data, data, out=tmp_path / "b", **settings)
    written, expected = (load_file(tmp_path / run / "model.safetensors") for run in "ab")
    assert same(written, expected)
    assert list(result.model.state_dict()) == [f"_orig_mod.{name}" for name in reference.model.state_dict()]
