"""What the interception must get right: the traps of DESIGN section 4, one by one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from tests.against_dense import armed, assert_dense_gradients, dense_gradients, gradients, squares
from tests.models import (
    IMAGE_NETWORKS,
    Checkpointed,
    Functional,
    Residual,
    SharedLayer,
    SharedWeight,
    gradient_errors,
    in_layout,
    normal,
    relative_error,
    seeded,
)
from trady.errors import ModelError

pytestmark = [
    # PyTorch's own: it pads strings of even kernels by a copy.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("no_mode_stays_behind"),
]


# -- the mode ----------------------------------------------------------------------------------------------------


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.error: BaseException | None = None

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
            vars(module)["inplace"] = False
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

    def direct(m: Any) -> Tensor:
        return m.blocks[0].conv1(m.stem(x)).square().sum() + m.blocks(m.stem(x)).sum()

    assert_dense_gradients(model, tuner, direct)
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


# -- what only this forward knows --------------------------------------------------------------------------------


class Drops(nn.Module):
    """Stochastic depth by Python's own random numbers: the trace sees one path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.skip = nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.skip:
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


def test_a_forward_that_leaves_the_traced_path_is_refused_and_runs_without_fusion() -> None:
    model, x = seeded(Drops).double(), normal(2, 3, 6, 6, dtype=torch.float64)
    tuner = armed(model, x)
    model.skip = True
    with pytest.raises(ModelError, match="fuse=False"):
        model(x)
    tuner.finish()
    model.skip = False
    tuner = armed(model, x, fuse=False)
    for skip in (True, False, True):
        model.skip = skip
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


@pytest.mark.parametrize("which", ["4.bias", "1.weight", "8.bias"])
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
    chance = random.Random(1)
    lengths = [chance.randint(1, 5) for _ in range(4)]
    assert len(set(lengths)) == 4
    for model.length in lengths:
        assert_dense_gradients(model, tuner, squares(x))
    tuner.finish()


def test_channels_last_and_autocast_together() -> None:
    model = in_layout(seeded(Residual), torch.channels_last).eval()
    x = normal(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    errors = gradient_errors(model, x, autocast=True, train=False)
    assert max(errors.values()) < 3e-2
