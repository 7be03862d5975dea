"""What the interception must get right: the traps of DESIGN section 4, one by one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import trady
from tests.models import (
    IMAGE_NETWORKS,
    Checkpointed,
    Functional,
    PreActivation,
    Residual,
    SharedLayer,
    SharedWeight,
    Tokens,
    channels_of,
    freeze_norms,
    gradient_errors,
    normal,
    relative_error,
    same,
    seeded,
    snapshot,
)
from trady.errors import ModelError, StateError

#: PyTorch's own: it pads strings of even kernels by a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EVERYTHING = "elements:100000000"


@pytest.fixture(autouse=True)
def _no_mode_stays_behind() -> Iterator[None]:
    yield
    assert _get_current_function_mode_stack() == []


def armed(model: nn.Module, example: Any, **options: Any) -> trady.Tuner:
    """Every channel of every layer trains."""
    return trady.prepare(model, example, **{"budget": EVERYTHING, "policy": "full", **options})


def gradients(tuner: trady.Tuner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in tuner.named_parameters() if p.grad is not None}


def dense_gradients(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The gradients of the plain model, in the form of ``named_parameters()``."""
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    dense.zero_grad()
    loss(dense).backward()
    named = dict(dense.named_parameters())
    found = {}
    for layer in tuner.plan.table:
        channels = tuner.selection.channels.get(layer.name)
        if channels is not None and named[layer.parameter].grad is not None:
            found[f"{layer.parameter}.channels"] = channels_of(named[layer.parameter].grad, layer, channels)
    head = {n: named[n].grad for n, _ in tuner.named_parameters() if n in named}
    return found | {name: gradient for name, gradient in head.items() if gradient is not None}


def assert_dense_gradients(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> None:
    expected = dense_gradients(model, tuner, loss)
    tuner.model.zero_grad()
    for parameter in tuner.parameters():
        parameter.grad = None
    loss(model).backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-10, name


def squares(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).square().sum()


# -- somebody else reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.parametrize("where", ["stem.0", "stem.1", "stem.2", "blocks.0.conv1", "blocks.0.bn1", "blocks.1"])
def test_a_users_hook_keeps_the_activation_that_pytorch_would_show_it(where: str, before: bool) -> None:
    model, x = seeded(lambda: Residual(inplace=False)).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    with torch.no_grad():
        handle = model.get_submodule(where).register_forward_hook(hook)
        model(x)
        expected = kept[0]
        kept.clear()
    if not before:
        handle.remove()
    tuner = armed(model, x)
    kept.clear()
    if not before:
        handle = model.get_submodule(where).register_forward_hook(hook)
    model(x)
    assert relative_error(kept[-1], expected) < 1e-12
    kept.clear()
    handle.remove()
    tuner.finish()


def test_a_hook_that_takes_the_place_of_an_old_one_is_noticed() -> None:
    model, x = seeded(lambda: Residual(inplace=False)).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = model.stem[0](x)
    old = model.stem[2].register_forward_hook(lambda *_: None)
    tuner = armed(model, x)
    old.remove()
    kept: list[Tensor] = []
    handle = model.stem[0].register_forward_hook(lambda module, args, output: kept.append(output))
    model(x)
    assert relative_error(kept[0], expected) < 1e-12
    handle.remove()
    tuner.finish()


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_backward_hook_sees_the_gradient_of_its_own_module(before: bool) -> None:
    model, x = seeded(lambda: Residual(inplace=False)).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, outputs: tuple[Tensor]) -> None:
        seen.append(outputs[0].clone())

    dense = copy.deepcopy(model)
    dense.blocks[0].conv1.register_full_backward_hook(hook)
    squares(x)(dense).backward()
    expected = seen.pop()
    if before:
        model.blocks[0].conv1.register_full_backward_hook(hook)
    tuner = armed(model, x)
    if not before:
        model.blocks[0].conv1.register_full_backward_hook(hook)
    squares(x)(model).backward()
    assert relative_error(seen.pop(), expected) < 1e-10
    tuner.finish()


class Custom(torch.autograd.Function):
    """A user's own operation, with a convolution inside and its output kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, y = ctx.saved_tensors
        assert torch.equal(y, F.conv2d(x, weight))
        return (
            torch.nn.grad.conv2d_input(x.shape, weight, gradient),
            torch.nn.grad.conv2d_weight(x, weight.shape, gradient),
        )


class WithCustom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.custom = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(Custom.apply(x, self.custom)) + F.relu(x)
        return self.head(x.mean((2, 3)))


def test_a_users_autograd_function_is_left_alone() -> None:
    model, x = seeded(WithCustom).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    assert tuner.plan.table.names == ("first",)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


class Retains(nn.Module):
    """Keeps what it computed: as an attribute, and with its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv1(x)
        return self.head(F.relu(self.norm(self.conv2(F.relu(self.kept)))).mean((2, 3)))


def test_an_activation_that_the_model_keeps_stays_what_it_was() -> None:
    model, x = seeded(Retains).double().eval(), normal(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model.conv1(x)
    tuner = armed(model, x)
    y = model(x)
    model.kept.retain_grad()
    y.sum().backward()
    assert relative_error(model.kept, expected) < 1e-12
    assert model.kept.grad is not None
    model.kept = None
    assert_dense_gradients(model, tuner, lambda m: m(x).sum())
    tuner.finish()


def test_gradients_that_a_user_keeps_are_never_written_into() -> None:
    """``register_hook`` hands out the very tensor that the backward pass goes on with."""
    model, x = seeded(PreActivation).double(), normal(2, 3, 9, 9, dtype=torch.float64)
    model.eval()

    def run(net: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(seen.append)

        handles = [m.register_forward_hook(watch) for m in net.modules() if isinstance(m, nn.Conv2d)]
        squares(x)(net).backward()
        for handle in handles:
            handle.remove()
        return seen

    expected = run(copy.deepcopy(model))
    tuner = armed(model, x)
    found = run(model)
    assert len(found) == len(expected)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(found, expected, strict=True))
    tuner.finish()


# -- the mode ----------------------------------------------------------------------------------------------------


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.error = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.error is not None:
            raise self.error
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_forward_that_raises_leaves_the_next_one_as_it_was(error: BaseException) -> None:
    model, x = seeded(Raising).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    for _ in range(2):
        model.error = error
        with pytest.raises(type(error)):
            model(x)
        model.error = None
        assert torch.equal(F.relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
        assert_dense_gradients(model, tuner, squares(x))
    model.error = error
    with pytest.raises(type(error)):
        model(x)
    model.error = None
    tuner.finish()
    assert _get_current_function_mode_stack() == []


def test_a_raise_that_the_model_catches_itself_changes_nothing() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.conv, self.head = Raising(), nn.Conv2d(3, 2, 3), nn.Linear(2, 2)
            self.inner.error = ValueError("no")

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except ValueError:
                return self.head(F.relu(self.conv(x)).mean((2, 3)))

    model, x = seeded(Catching).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


@pytest.mark.parametrize("name", ["residual", "padded", "perceptron"])
def test_every_submodule_called_directly_gives_what_it_gives_alone(name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    model, x = seeded(build).double().eval(), normal(2, *shape, dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(path, (args[0].clone(), output.clone())) and None

    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for path, module in plain.named_modules():
        module.register_forward_hook(watch(path))
    with torch.no_grad():
        plain(x)
    tuner = armed(model, x)
    for path, (given, expected) in seen.items():
        module = model.get_submodule(path)
        kept = given.clone()
        given.requires_grad_(True)
        asked = getattr(module, "inplace", False) or any(
            getattr(m, "inplace", False) for m in list(module.modules())[1:2]
        )
        with torch.set_grad_enabled(not asked):
            found = module(given)
        assert relative_error(found, expected) < 1e-12, path
        assert asked or torch.equal(given, kept), f"{path} wrote into its input"
    tuner.finish()


def test_a_layer_called_directly_has_the_dense_gradient() -> None:
    model, x = seeded(Residual).double(), normal(2, 3, 9, 9, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(
        model, tuner, lambda m: m.blocks[0].conv1(m.stem(x)).square().sum() + m.blocks(m.stem(x)).sum()
    )
    tuner.finish()


def test_evaluation_in_the_middle_of_training_changes_nothing() -> None:
    model, x = seeded(Residual).double(), normal(4, 3, 9, 9, dtype=torch.float64)
    plain = copy.deepcopy(model).eval()
    tuner = armed(model, x)
    with torch.inference_mode():
        assert relative_error(model.eval()(x), plain(x)) < 1e-12
    model.train()
    assert_dense_gradients(model, tuner, squares(x))
    loss = squares(x)(model)
    with torch.no_grad():
        model.eval()
        assert relative_error(model(x[:1]), plain(x[:1])) < 1e-12
        model.train()
    for parameter in tuner.parameters():
        parameter.grad = None
    loss.backward()
    interrupted = gradients(tuner)
    assert all(relative_error(interrupted[n], g) < 1e-10 for n, g in dense_gradients(model, tuner, squares(x)).items())
    tuner.finish()


def test_inference_mode_sees_the_trained_channels() -> None:
    model, x = seeded(Residual), normal(4, 3, 9, 9)
    tuner = armed(model, x)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    squares(x)(model).backward()
    optimizer.step()
    with torch.inference_mode():
        now = model.eval()(x)
    finished = tuner.finish()
    with torch.no_grad():
        assert relative_error(now, finished(x)) < 1e-5


def test_gradients_accumulate_over_backward_passes() -> None:
    model, x = seeded(Residual).double(), normal(4, 3, 9, 9, dtype=torch.float64)
    tuner = armed(model, x)
    expected = dense_gradients(model, tuner, lambda m: m(x[:1]).square().sum() + m(x[1:]).square().sum())
    for part in (x[:1], x[1:]):
        squares(part)(model).backward()
    assert all(relative_error(gradients(tuner)[n], g) < 1e-10 for n, g in expected.items())
    tuner.finish()


def test_two_forwards_before_one_backward() -> None:
    model, x = seeded(Residual).double(), normal(4, 3, 9, 9, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, lambda m: (m(x[:2]) * m(x[2:])).sum())
    tuner.finish()


def test_switching_between_training_and_evaluation_mode() -> None:
    model, x = seeded(IMAGE_NETWORKS["perceptron"][0]).double(), normal(4, 3, 4, 4, dtype=torch.float64)
    tuner = armed(model, x)

    def loss(net: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return net(x).square().sum()

    for mode in (True, False, True):
        model.train(mode)
        assert_dense_gradients(model, tuner, loss)
    tuner.finish()


# -- the same weight, more than once -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [SharedLayer, SharedWeight])
def test_a_weight_used_several_times_gets_the_sum_of_its_gradients(build: Callable[[], nn.Module]) -> None:
    model, x = seeded(build).double(), normal(2, 3, 8, 8, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_a_shared_layer_steps_once_for_all_its_calls() -> None:
    model, x = seeded(SharedWeight).double(), normal(2, 3, 8, 8, dtype=torch.float64)
    dense = copy.deepcopy(model)
    tuner = armed(model, x)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    biases = [p for n, p in dense.named_parameters() if n.endswith("bias") and not n.startswith("head")]
    for bias in biases:
        bias.requires_grad_(False)
    reference = torch.optim.SGD([p for p in dense.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        for net, steps in ((model, optimizer), (dense, reference)):
            squares(x)(net).backward()
            steps.step()
            steps.zero_grad()
    tuner.finish()
    for (name, found), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert relative_error(found, expected) < 1e-10, name


# -- recomputation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("what", ["block", "method"])
def test_checkpointed_segments_have_the_gradients_of_plain_ones(what: str, reentrant: bool, dropout: float) -> None:
    x = normal(2, 3, 7, 7, dtype=torch.float64)
    plain = seeded(lambda: Checkpointed("", False, dropout)).double()
    model = seeded(lambda: Checkpointed(what, reentrant, dropout)).double()

    def loss(net: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return net(x).square().sum()

    tuner = armed(model, x)
    assert len(tuner.plan.table) == 5
    expected = dense_gradients(plain, tuner, loss)
    loss(model).backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-10, name
    tuner.finish()


class StartsWithNorm(nn.Module):
    """Checkpointed blocks that begin with what could overwrite its input: the input is what is recomputed from."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(6), nn.LeakyReLU(0.3), nn.Conv2d(6, 6, 3, padding=1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_what_a_checkpoint_recomputes_from_is_not_overwritten(reentrant: bool) -> None:
    model, x = seeded(lambda: StartsWithNorm(reentrant)).double(), normal(2, 3, 7, 7, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


# -- the model stays the user's ----------------------------------------------------------------------------------


def test_an_armed_model_prints_and_saves_as_before() -> None:
    model, x = seeded(Residual), normal(2, 3, 9, 9)
    printed, keys, classes = str(model), list(model.state_dict()), [type(m) for m in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    tuner = armed(model, x)
    assert (str(model), list(model.state_dict()), [type(m) for m in model.modules()]) == (printed, keys, classes)
    assert [name for name, _ in model.named_parameters()] == names
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file)) == keys
    tuner.finish()


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_armed_model_is_a_plain_working_model(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = seeded(Residual).double().eval(), normal(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    tuner = armed(model, x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    twin.requires_grad_(True)
    twin(x).sum().backward()
    assert twin.stem[0].weight.grad is not None  # through PyTorch's own backward: nothing is intercepted
    again = armed(twin, x)  # and it can be prepared itself
    assert_dense_gradients(twin, again, squares(x))
    again.finish()
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_batch_norm_statistics_and_counters_do_not_move() -> None:
    model, x = seeded(Residual), normal(4, 3, 9, 9)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tuner = armed(model.train(), x)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    for _ in range(2):
        squares(x)(model).backward()
        optimizer.step()
    tuner.finish()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_norm_that_averages_over_all_batches_is_frozen_like_any_other() -> None:
    """``momentum=None`` divides by the number of batches counted so far, which may be 0."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, momentum=None),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )

    model, x = seeded(build).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    assert int(model[1].num_batches_tracked) == 0
    tuner.finish()


def test_a_norm_without_running_statistics_trains_through_pytorch() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(),
            nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2),
        )  # fmt: skip

    model, x = seeded(build).double(), normal(3, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_weights_loaded_into_an_armed_model_are_what_trains_on() -> None:
    model, x = seeded(Residual), normal(2, 3, 9, 9)
    other = seeded(Residual, seed=9)
    tuner = armed(model, x)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.0))
    model.load_state_dict(other.state_dict())
    squares(x)(model).backward()
    optimizer.step()
    tuner.finish()
    assert same(snapshot(model), snapshot(other))


def test_a_model_moved_to_another_type_goes_on_training() -> None:
    model, x = seeded(Residual), normal(2, 3, 9, 9)
    tuner = armed(model, x)
    model.double()
    model(x.double()).sum().backward()
    with pytest.raises(StateError, match="finish"):
        armed(model, x)
    tuner.finish()


# -- what only this forward knows --------------------------------------------------------------------------------


class Drops(nn.Module):
    """Stochastic depth by Python's own random numbers: the trace sees one path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.skips = nn.Linear(4, 3), lambda: False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.skips():
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


def test_a_forward_that_leaves_the_traced_path_is_refused_and_runs_without_fusion() -> None:
    model, x = seeded(Drops).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    model.skips = lambda: True
    with pytest.raises(ModelError, match="fuse=False"):
        model(x)
    tuner.finish()
    model.skips = lambda: False
    tuner = armed(model, x, fuse=False)
    for skip in (True, False, True):
        model.skips = lambda skip=skip: skip
        assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


class Routes(nn.Module):
    """Alternative branches of the same shape: the calls look alike, the weights differ."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head, self.route = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convs[self.route if self.what == "layer" else 0]
        norm = self.norms[self.route]
        return self.head(F.relu(norm(conv(x))).mean((2, 3)))


@pytest.mark.parametrize("what", ["layer", "norm"])
def test_another_branch_of_the_same_shape_is_never_computed_with_the_traced_one(what: str) -> None:
    model, x = seeded(lambda: Routes(what)).double().eval(), normal(2, 3, 6, 6, dtype=torch.float64)
    model.route = 1
    with torch.no_grad():
        expected = model(x)
    model.route = 0
    tuner = armed(model, x)
    model.route = 1
    if what == "layer":  # nothing was computed together yet: it goes on without
        assert relative_error(model(x), expected) < 1e-12
    else:  # convolution and norm were computed together already
        with pytest.raises(ModelError, match="fuse=False"):
            model(x)
    tuner.finish()
    model.route = 0
    tuner = armed(model, x, fuse=False)
    model.route = 1
    assert relative_error(model(x), expected) < 1e-12
    tuner.finish()


@pytest.mark.parametrize("which", ["4.bias", "4.weight", "1.weight", "8.bias"])
def test_a_parameter_made_trainable_afterwards_is_never_silently_wrong(which: str) -> None:
    build, shape = IMAGE_NETWORKS["padded"]
    model, x = seeded(build).double().eval(), normal(2, *shape, dtype=torch.float64)
    tuner = armed(model, x)
    model.get_parameter(which).requires_grad_(True)
    with pytest.raises(ModelError, match="head="):
        model(x)
    tuner.finish()
    assert all(p.requires_grad for p in model.parameters())


class Odd(nn.Module):
    """Activations in places where an overwriting operation must look twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        strided = x.permute(0, 3, 1, 2) + 1  # neither contiguous nor channels_last
        F.relu_(strided)
        part = x * 1
        F.leaky_relu(part[:, :2], 0.3, inplace=True)  # a view: the rest must stay
        other = x + 1
        F.hardtanh(other, -0.5, 0.5, inplace=True)
        counts = torch.relu(torch.arange(-2, 3))
        total = strided.permute(0, 2, 3, 1) + part + other + counts.sum()
        return self.head(F.adaptive_avg_pool2d(total, (1, None)).mean((2, 3)))


def test_activations_that_the_model_asks_to_be_in_place() -> None:
    model, x = seeded(Odd).double(), normal(2, 3, 6, 7, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


class WritesInto(nn.Module):
    """Adds into what each operation returned."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv1d, self.point, self.addmm = nn.Conv1d(3, 16, 3, padding=1), nn.Conv2d(4, 4, 1), Conv1D(8, 16)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1d(x)
        y += 1
        z = y.unflatten(1, (4, 4))
        z = self.point(z)
        z += 1
        z = F.avg_pool1d(z.flatten(1, 2), 2)
        z += 1
        z = F.max_pool1d(z, 2)
        z *= 2
        z = F.hardtanh(z) + 0
        z += 1
        w = self.addmm(z.transpose(1, 2).contiguous())
        w += 1
        return self.head(w.mean(1))


def test_models_may_write_into_what_an_operation_returns() -> None:
    model, x = seeded(WritesInto).double(), normal(2, 3, 64, dtype=torch.float64)
    tuner = armed(model, x)
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_another_function_mode_around_the_model_sees_its_calls() -> None:
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.calls += 1
            return func(*args, **(kwargs or {}))

    model, x = seeded(Residual).double(), normal(2, 3, 9, 9, dtype=torch.float64)
    tuner = armed(model, x)
    with Counting():
        assert_dense_gradients(model, tuner, squares(x))
    assert Counting.calls > 0
    tuner.finish()


# -- what is kept ------------------------------------------------------------------------------------------------


def test_nothing_is_kept_and_no_gradient_computed_in_front_of_the_first_selected_layer() -> None:
    model, x = seeded(lambda: Residual(blocks=3)), normal(4, 3, 17, 17)

    class Last:
        name, uses_ranking = "last", False

        def select(self, draw: Any) -> trady.Selection:
            return trady.Selection({"blocks.2.conv1": [0, 3]})

    tuner = trady.prepare(model, x, budget=EVERYTHING, policy=Last())
    ledger = tuner.ledger(lambda: squares(x)(model).backward())
    assert {saved.layer for saved in ledger.saved} <= {
        "blocks.2.conv1",
        "blocks.2.conv2",
        "blocks.2",
        "head",
        "(loss)",
        "(model)",
        "blocks.2.bn1",
        "blocks.2.bn2",
        "blocks.2.relu",
    }
    assert ledger.saved_bytes_of("channels") == 2 * 9 * 9 * 4 * 4 == tuner.cost().saved_channel_bytes
    assert model.stem(x).requires_grad is False
    tuner.finish()


def test_with_the_head_alone_nothing_of_the_network_is_kept() -> None:
    model, x = seeded(Residual), normal(4, 3, 9, 9)
    tuner = trady.prepare(model, x, policy="head")
    ledger = tuner.ledger(lambda: squares(x)(model).backward())
    assert {saved.layer for saved in ledger.saved} <= {"head", "(loss)"}
    tuner.finish()


@pytest.mark.parametrize("name", [n for n in IMAGE_NETWORKS if n != "functional"])
def test_the_saved_channels_are_the_plans_to_the_byte(name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    model, x = seeded(build), normal(3, *shape)
    tuner = trady.prepare(model, x, budget="elements:600", policy="dynamic-random")
    for epoch in range(3):
        tuner.resample(epoch)
        ledger = tuner.ledger(lambda: squares(x)(model).backward())
        assert ledger.saved_bytes_of("channels") == tuner.cost().saved_channel_bytes
    tuner.finish()


def test_activations_are_kept_in_bits_and_pooling_in_bytes() -> None:
    model, x = seeded(lambda: Residual(width=16, inplace=False)), normal(4, 3, 16, 16)
    tuner = trady.prepare(model, x, budget="elements:100000", policy="full")
    ledger = tuner.ledger(lambda: squares(x)(model).backward())
    kinds = {(saved.layer, saved.kind): saved.bytes for saved in ledger.saved}
    assert kinds["stem.0", "bits"] == 4 * 16 * 16 * 16 // 8
    assert kinds["pool", "indices"] == 4 * 16 * 8 * 8
    assert ledger.saved_bytes_of("activations") < ledger.saved_bytes_of("bits")
    tuner.finish()


def test_the_ledger_names_the_operations_that_are_not_lean() -> None:
    model = seeded(Tokens)
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    tuner = armed(model, ids, recompute="none")
    assert_close = dense_gradients(model, tuner, squares(ids))
    ledger = tuner.ledger(lambda: squares(ids)(model).backward())
    assert {"gelu", "sigmoid"} <= {saved.operation for saved in ledger.saved if saved.kind == "activations"}
    assert all(relative_error(gradients(tuner)[n], g) < 1e-5 for n, g in assert_close.items())
    tuner.finish()


def test_a_step_leaves_nothing_alive() -> None:
    model, x = seeded(Residual), normal(2, 3, 9, 9)
    tuner = armed(model, x)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))

    def step() -> int:
        squares(x)(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    step()
    assert step() == step()
    tuner.finish()


# -- several processes -------------------------------------------------------------------------------------------


def _rank(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = seeded(Residual).double()
        x = normal(4, 3, 9, 9, dtype=torch.float64)
        tuner = trady.prepare(model, x[:2], budget="elements:900", policy="trady", seed=3)
        optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05, momentum=0.9))
        wrapped = nn.parallel.DistributedDataParallel(model)
        digests, grads = [], {}
        for epoch in range(3):
            tuner.resample(epoch)
            for step in range(3):
                optimizer.zero_grad()
                wrapped(x[rank::2]).square().sum(1).mean().backward()
                if epoch == step == 0:
                    grads = gradients(tuner)
                optimizer.step()
                digests.append(tuner.selection.digest)
        torch.save({"digests": digests, "grads": grads, "weights": snapshot(tuner.finish())}, f"{results}{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_average_their_gradients_and_draw_the_same_channels(tmp_path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "result")), nprocs=2)
    first, second = (torch.load(tmp_path / f"result{rank}") for rank in range(2))
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) > 2
    assert same(first["weights"], second["weights"])
    model, x = seeded(Residual).double(), normal(4, 3, 9, 9, dtype=torch.float64)
    tuner = trady.prepare(model, x[:2], budget="elements:900", policy="trady", seed=3)
    assert_expected = dense_gradients(model, tuner, lambda m: m(x).square().sum(1).mean())
    assert first["grads"].keys() == assert_expected.keys()
    for name, gradient in assert_expected.items():
        assert relative_error(first["grads"][name], gradient) < 1e-10, name
    tuner.finish()


def test_functional_networks_have_a_layer_for_every_weight() -> None:
    model, x = seeded(Functional).double(), normal(2, 3, 9, 9, dtype=torch.float64)
    tuner = armed(model, x)
    assert [layer.parameter for layer in tuner.plan.table] == ["first", "second", "hidden"]
    assert len(set(tuner.plan.table.names)) == 3
    assert set(dict(tuner.named_parameters())) == {
        "first.channels",
        "second.channels",
        "hidden.channels",
        "classifier",
        "bias",
    }
    assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_random_paths_with_the_same_weights_many_times() -> None:
    """A recurrent forward whose length differs from call to call runs without fusion."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head, self.length = nn.Linear(4, 4), nn.Linear(4, 2), 2

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.length):
                x = F.relu(self.cell(x))
            return self.head(x)

    model, x = seeded(Loop).double(), normal(3, 4, dtype=torch.float64)
    tuner = armed(model, x, fuse=False)
    for _ in range(4):
        model.length = random.Random(1).randint(1, 5)
        assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_channels_last_and_autocast_together() -> None:
    model = seeded(Residual).to(memory_format=torch.channels_last).eval()
    x = normal(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    errors = gradient_errors(model, x, autocast=True, train=False)
    assert max(errors.values()) < 3e-2


@pytest.mark.parametrize("padding", [1, 0], ids=["padded inside", "padded in front"])
def test_channels_last_takes_no_more_memory(padding: int) -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(24, 24, 3, 2, padding, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 8, 3, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    peaks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = seeded(network).to(memory_format=layout)
        x = normal(8, 3, 64, 64).contiguous(memory_format=layout)
        tuner = armed(model, x, budget="elements:40000", policy="dynamic-random")
        assert any(parameter.numel() for parameter in tuner.parameters())
        peaks.append(trady.measure(lambda model=model, x=x: squares(x)(model).backward(), model).peak_bytes)
        tuner.finish()
    assert peaks[1] <= 1.02 * peaks[0]


def test_gradients_of_residual_branches_are_added_in_place() -> None:
    """As autograd does in plain PyTorch: nothing that trady asks of a gradient makes it look shared."""
    model, x = seeded(lambda: Residual(blocks=3)), normal(4, 3, 32, 32)
    tuner = armed(model, x, budget="elements:40000", policy="dynamic-random")
    loss = squares(x)(model)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    tuner.finish()
    of_activations = [
        e.name for e in seen.events() if e.name in ("aten::add", "aten::add_") and e.input_shapes[0][:1] == [4]
    ]
    assert of_activations.count("aten::add_") >= 2
    assert "aten::add" not in of_activations


def test_what_an_unshared_gradient_shows_does_not_depend_on_who_watches() -> None:
    """Following storages makes Python objects of them: taken for normal, shared gradients would be overwritten."""
    from trady.memory.live import LiveBytes
    from trady.ops import layout

    found = []
    for watched in (True, False):
        layout._references_when_alone.cache_clear()
        with LiveBytes() if watched else nullcontext():
            found.append((layout._references_when_alone(), layout._references(torch.ones(3) + 1)))
    assert found[0][0] is not None
    assert found[0] == found[1]
