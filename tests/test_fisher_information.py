"""Fisher information of activations: that of single samples, from whole batches, inside the budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
import trady.interception.deferred_segment
from tests.models import IMAGE_NETWORKS, Residual, freeze_norms, gradient_of, normal, seeded, tensor_of
from tests.tuned import observed
from trady.channels.table import ChannelTable
from trady.ops.gates import Gates
from trady.ops.selected import select_channels

Batch = tuple[Any, Tensor]


class Fisher:
    """Takes what fits; only what it has measured matters here."""

    name, uses_ranking = "fisher-of-all", False
    needs = trady.policies.Needs(("fisher",))

    def select(self, draw: trady.policies.Draw) -> trady.Selection:
        return trady.Selection()


def loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(tensor_of(output), target)


def measured(
    model: nn.Module, batches: list[Batch], budget: str = "elements:4000", **options: Any
) -> tuple[dict[str, np.ndarray], trady.Plan, list[int]]:
    """The Fisher information, the plan, and for each pass the number of batches up to then."""
    tuner = trady.prepare(model, batches[0][0], budget=budget, policy=Fisher(), **options)
    passes: list[int] = []
    found = tuner.observe(batches, loss, progress=lambda _, given: passes.append(given))
    plan, sweeps = tuner.plan, len(tuner._decision.sweeps(tuner._draws.moment, tuner.selection, tuner.plan.table.batch))
    tuner.finish()
    assert found is not None
    assert len(passes) >= sweeps * len(batches)
    return dict(found["fisher"]), plan, [len(passes) // (sweeps * len(batches))]


def of_single_samples(model: nn.Module, table: ChannelTable, batches: list[Batch]) -> dict[str, np.ndarray]:
    """½ · mean of ⟨W[:, c], ∂L_n/∂W[:, c]⟩², which is Σ_positions a · ∂L_n/∂a since a layer is linear in its input."""
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    squares: dict[str, list[np.ndarray]] = {layer.name: [] for layer in table}
    for inputs, targets in batches:
        for i in range(len(targets)):
            dense.zero_grad()
            one = {k: v[i : i + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[i : i + 1]
            loss(dense(**one) if isinstance(one, dict) else dense(one), targets[i : i + 1]).backward()
            for layer in table:
                weight = dense.get_parameter(layer.parameter)
                product = (weight * gradient_of(weight)).detach()
                if layer.kind != "addmm":
                    product = product.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
                squares[layer.name].append(product.flatten(1).sum(1).square().numpy())
    return {name: np.mean(values, axis=0) / 2 for name, values in squares.items()}


def assert_that_of_single_samples(
    found: dict[str, np.ndarray], model: nn.Module, plan: trady.Plan, batches: list[Batch]
) -> None:
    for name, wanted in of_single_samples(model, plan.table, batches).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=1e-18)
    assert max(values.max() for values in found.values()) > 0


def images(shape: tuple[int, ...], sizes: tuple[int, ...] = (5, 3)) -> list[Batch]:
    return [(normal(n, *shape, seed=n).double(), torch.arange(n).remainder(3)) for n in sizes]


# -- what it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IMAGE_NETWORKS])
def test_one_pass_of_a_batch_gives_what_a_pass_of_every_sample_would(name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    model, batches = seeded(build).double().eval(), images(shape)
    found, plan, passes = measured(model, batches)
    assert_that_of_single_samples(found, model, plan, batches)
    assert passes == [1], "passes of single samples"


def test_it_is_the_squared_sum_of_activation_times_gradient() -> None:
    """By autograd on each layer's own input, sample by sample."""
    model, ((x, y),) = seeded(Residual).double(), images((3, 9, 9), (5,))
    found, plan, _ = measured(model, [(x, y)])
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    for layer in plan.table:
        wanted = [activation_fisher(dense, layer, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        np.testing.assert_allclose(found[layer.name], np.mean(wanted, axis=0) / 2, rtol=1e-6, atol=1e-20)


def activation_fisher(model: nn.Module, layer: trady.Layer, x: Tensor, y: Tensor) -> np.ndarray:
    """(Σ_positions a · ∂L/∂a)² of each input channel."""
    inputs: list[Tensor] = []

    def own_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())  # a leaf: only the path through this layer counts
        return (inputs[-1], *args[1:])

    handle = model.get_submodule(layer.name).register_forward_pre_hook(own_input)
    try:
        F.cross_entropy(model(x), y).backward()
    finally:
        handle.remove()
    (a,) = inputs
    return (a.detach() * gradient_of(a)).sum((0, *range(2, a.dim()))).square().numpy()


def test_gates_are_factors_of_the_input() -> None:
    """Their gradient is that of a multiplication in front of the layer."""
    x, weight = normal(6, 5, 4, 3).double().requires_grad_(), normal(7, 5, 1, 1).double()
    gates = torch.ones(3, 5, dtype=torch.double, requires_grad=True)  # three samples of two rows each
    scaled = x * gates.repeat_interleave(2, 0)[:, :, None, None]
    given = normal(6, 7, 4, 3, seed=1).double()
    gradient, expected = torch.autograd.grad((F.conv2d(scaled, weight) * given).sum(), [scaled, gates])
    chosen = select_channels(np.array([0, 3]), 1, 5, x.device)
    found = torch.zeros(2, 3, dtype=torch.double)
    rows = Gates.of(chosen, 3, 6, 1)
    for part in (slice(0, 2), slice(2, 6)):
        rows.add_gradient(found, gradient[part], x.detach()[:, [0, 3]], part)
    torch.testing.assert_close(found, expected[:, [0, 3]].t())


# -- where samples lie -------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Two linear layers over [N, T, C] whose rows are arranged in some way in between."""

    def __init__(self, arrange: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.arrange, self.back = arrange, back
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.arrange(torch.relu(self.first(x)))
        return self.head(self.back(torch.relu(self.second(rows)), x).mean(1))


def _alone(rows: Tensor, x: Tensor) -> Tensor:
    return rows.unflatten(0, x.shape[:2]) if rows.dim() == 2 else rows.reshape(x.shape)


ARRANGED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], bool]] = {
    "as they are": (lambda x: x, lambda y, x: y, True),
    "flat": (lambda x: x.flatten(0, 1), _alone, True),
    "in windows": (lambda x: x.unflatten(1, (2, -1)).flatten(0, 1), _alone, True),
    "positions first": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1), False),
    "positions first, flat": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, x: y.unflatten(0, (x.shape[1], -1)).transpose(0, 1),
        False,
    ),
    "less the batch's mean": (lambda x: x - x.mean(0, keepdim=True) / 2, lambda y, x: y, False),
}


@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("size", [4, 3])
def test_samples_are_told_apart_wherever_they_lie(name: str, size: int) -> None:
    arrange, back, together = ARRANGED[name]
    model, batches = seeded(lambda: Rows(arrange, back)).double(), images((4, 6), (size, size))
    found, plan, passes = measured(model, batches)
    assert passes == [1 if together else size]
    assert_that_of_single_samples(found, model, plan, batches)


def test_a_loss_that_weighs_samples_is_that_of_every_sample_alone() -> None:
    """The mean over a batch divides by the sum of the weights: not the mean of what single samples have."""
    model, ((x, y),) = seeded(Residual).double(), images((3, 9, 9), (5,))
    weight = torch.tensor([1.0, 5.0, 0.2]).double()
    found = []
    for size in (5, 1):
        parts = list(zip(x.split(size), y.split(size), strict=True))
        tuner = trady.prepare(model, x, budget="elements:90000", policy=Fisher())
        given = torch.cat([weight, weight.new_ones(model.head.out_features - 3)])
        found.append(observed(tuner, parts, partial(F.cross_entropy, weight=given))["fisher"])
        tuner.finish()
    for name, values in found[0].items():
        np.testing.assert_allclose(values, found[1][name], rtol=1e-9)


@pytest.mark.parametrize("name", ["Swin", "ViT, by hand", "BERT", "EfficientNet, by hand"])
def test_segments_that_are_computed_anew_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.recomputed_models import RECOMPUTED, recomputed_model

    model, inputs = recomputed_model(name)
    assert RECOMPUTED[name][2]
    monkeypatch.setattr(trady.interception.deferred_segment, "_samples_at_once", lambda program: 2)
    batches = [(inputs, torch.tensor([0, 1, 1, 0]))]
    found, plan, passes = measured(model.eval(), batches, "elements:20000", recompute="all")
    assert plan.recomputed
    assert passes == [1]
    assert_that_of_single_samples(found, model, plan, batches)


# -- inside the budget -------------------------------------------------------------------------------------------


def test_what_is_kept_of_every_sample_is_part_of_an_update_budget() -> None:
    """A depthwise channel has nine weights, and 64 samples: two such numbers each are more than two of nine weights."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(32, 3))
    batch = (normal(64, 3, 2, 2), torch.arange(64).remainder(3))
    tuner = trady.prepare(model, batch[0], budget="update:6000 B", policy=Fisher())
    table = tuner.plan.table
    for selection in tuner._decision.sweeps(tuner._draws.moment, tuner.selection, table.batch):
        kept = table.saved_bytes(selection) + 4 * 64 * selection.count + 4 * table.weight_elements(selection)
        assert kept <= 6000
    assert len(tuner._decision.sweeps(tuner._draws.moment, tuner.selection, 64)) > len(
        tuner._decision.sweeps(tuner._draws.moment, tuner.selection)
    )
    tuner.finish()


def test_parts_of_a_batch_give_what_the_batch_does() -> None:
    batches = images((3, 9, 9), (6,))
    whole, plan, _ = measured(seeded(Residual).double(), batches, "peak:4 MiB")
    parts, _, _ = measured(seeded(Residual).double(), batches, "peak:4 MiB", micro_batch=2)
    for name in plan.table.names:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9)


def test_it_leaves_the_selection_that_trains_as_it_was() -> None:
    """The selection of a sweep may be the very one that trains."""
    model, batches = seeded(Residual).double(), images((3, 9, 9))
    tuner = trady.prepare(model, batches[0][0], budget="elements:900000", policy="fisher")
    tuner.observe(batches, loss)
    tuner.resample(0)
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    for layer in tuner.plan.table:
        compact = dict(tuner.named_parameters())[f"{layer.parameter}.channels"]
        assert compact.grad is not None
        assert compact.grad.shape == compact.shape
        assert compact.shape[0] == layer.channels
    tuner.finish()
