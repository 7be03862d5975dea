"""What the interception keeps of a step, and what it writes into."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import trady
from tests.against_dense import EVERYTHING, armed, dense_gradients, gradients, squares
from tests.models import IMAGE_NETWORKS, Residual, Tokens, in_layout, normal, relative_error, seeded

pytestmark = [
    # PyTorch's own: it pads strings of even kernels by a copy.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("no_mode_stays_behind"),
]


def backward(model: nn.Module, x: Tensor) -> None:
    squares(x)(model).backward()


def test_nothing_is_kept_and_no_gradient_computed_in_front_of_the_first_selected_layer() -> None:
    model, x = seeded(lambda: Residual(blocks=3)), normal(4, 3, 17, 17)

    class Last:
        name, uses_ranking = "last", False

        def select(self, draw: Any) -> trady.Selection:
            return trady.Selection({"blocks.2.conv1": np.array([0, 3])})

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
        model = in_layout(seeded(network), layout)
        x = normal(8, 3, 64, 64).contiguous(memory_format=layout)
        tuner = armed(model, x, budget="elements:40000", policy="dynamic-random")
        assert any(parameter.numel() for parameter in tuner.parameters())
        peaks.append(trady.measure(partial(backward, model, x), model).peak_bytes)
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
