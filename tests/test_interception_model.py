"""The armed model stays the user's: it prints, saves, copies, moves and is wrapped as before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

import trady
from tests.against_dense import armed, assert_dense_gradients, dense_gradients, gradients, squares
from tests.models import Residual, normal, relative_error, same, seeded, snapshot
from trady.errors import StateError

pytestmark = [
    # PyTorch's own: it pads strings of even kernels by a copy.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("no_mode_stays_behind"),
]


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
    assert (
        twin.get_parameter("stem.0.weight").grad is not None
    )  # through PyTorch's own backward: nothing is intercepted
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
    assert int(model.get_buffer("1.num_batches_tracked")) == 0
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


def test_two_processes_average_their_gradients_and_draw_the_same_channels(tmp_path: Path) -> None:
    spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "result")), nprocs=2)
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
