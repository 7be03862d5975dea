"""Convolutions whose filters are standardised in the forward pass: NFNet's and BiT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from benchmarks.gradients import layer_errors
from trady.estimates.heads import train_with_fixed_statistics
from trady.ops.standardised import standardise, standardised_convolution
from trady.planning.budget import InfeasibleBudgetError


class StandardisedConv2d(nn.Conv2d):
    """As timm and transformers write it: with a gain NFNet's, without one BiT's."""

    def __init__(self, *args: Any, gain: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5) if gain else None

    def filters(self) -> Tensor:
        gain = None if self.gain is None else (self.gain * 0.7).view(-1)
        flat = self.weight.reshape(1, self.out_channels, -1)
        hat = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return hat.reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class WithPenalty(StandardisedConv2d):
    """Somebody besides the convolution reads the standardised filters."""

    def forward(self, x: Tensor) -> Tensor:
        filters = self.filters()
        made = F.conv2d(x, filters, self.bias, self.stride, self.padding)
        return made + filters.square().mean()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        StandardisedConv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        StandardisedConv2d(24, 24, 3, padding=1, groups=24, gain=False),
        nn.GELU(),
        StandardisedConv2d(24, 32, 1, stride=2),
        nn.GELU(),
        StandardisedConv2d(32, 32, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


IMAGES, LABELS = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])

STANDARDISED = ["2", "4", "6", "8"]


def backward(model: nn.Module) -> float:
    train_with_fixed_statistics(model)
    loss = F.cross_entropy(model(IMAGES), LABELS)
    loss.backward()
    return float(loss.detach())


def pair(budget: str, **options: Any) -> tuple[nn.Module, nn.Module, trady.Tuner, float]:
    """A dense network and one that is prepared, after a backward pass each, and by how much their losses differ."""
    dense, sparse = network(), network()
    tuner = trady.prepare(sparse, IMAGES, budget=budget, policy="static-random", ranking="structural", **options)
    before = backward(dense)
    backward(sparse)  # the first pass asks what a later one knows
    for parameter in tuner.parameters():
        parameter.grad = None
    return dense, sparse, tuner, backward(sparse) - before


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_the_gradient_is_the_dense_one_but_for_what_changes_statistics(recompute: str) -> None:
    dense, _, tuner, difference = pair("elements:6000", recompute=recompute)
    assert difference == pytest.approx(0, abs=1e-6)
    errors = layer_errors(dense, tuner)
    assert set(STANDARDISED) <= set(errors)
    assert max(errors.values()) < 1e-5


def test_a_step_along_it_goes_downhill() -> None:
    dense, _, tuner, _ = pair("elements:6000")
    compact = dict(tuner.named_parameters())
    for name, channels in tuner.selection.items():
        if name not in ("2", "6"):  # one group
            continue
        got, whole = compact[f"{name}.weight.channels"].grad, dense.get_parameter(f"{name}.weight").grad
        assert got is not None
        assert whole is not None
        wanted = whole[:, torch.from_numpy(channels.copy())].transpose(0, 1)
        assert float((got * wanted).sum()) == pytest.approx(float(got.square().sum()), rel=1e-4)
        assert float(got.norm()) < float(wanted.norm())


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_where_all_channels_train_it_is_the_dense_one(recompute: str) -> None:
    dense, _, tuner, _ = pair("elements:1000000", recompute=recompute)
    for name in STANDARDISED:
        got, whole = (
            dict(tuner.named_parameters())[f"{name}.weight.channels"].grad,
            dense.get_parameter(f"{name}.weight").grad,
        )
        assert got is not None
        assert whole is not None
        torch.testing.assert_close(got.norm(), whole.norm(), rtol=1e-5, atol=0)
    assert max(layer_errors(dense, tuner).values()) < 1e-5


def test_what_the_table_says_of_them() -> None:
    table = trady.plan(network(), IMAGES, budget="elements:6000").table
    assert [layer.name for layer in table if layer.standardised] == STANDARDISED
    assert [(layer.kind, layer.groups) for layer in table][1:] == [
        ("conv2d", 1), ("conv2d", 24), ("conv2d", 1), ("conv2d", 4),
    ]  # fmt: skip


def test_a_peak_budget_holds() -> None:
    sparse = network()
    with pytest.raises(InfeasibleBudgetError) as too_little:
        trady.prepare(sparse, IMAGES, budget="peak:1 B", ranking="structural")
    limit = int(1.2 * too_little.value.least_amount)
    tuner = trady.prepare(sparse, IMAGES, budget=f"peak:{limit} B", ranking="structural")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))

    def step() -> None:
        backward(sparse)
        optimizer.step()
        optimizer.zero_grad()

    step()
    ledger = tuner.ledger(step, inference=False)
    assert tuner.plan.predicted_peak_bytes == pytest.approx(ledger.peak_bytes, rel=0.03)
    assert ledger.peak_bytes <= limit


def test_filters_that_are_read_elsewhere_stay_as_they_are() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), WithPenalty(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))

    dense, sparse = build(), build()
    tuner = trady.prepare(sparse, IMAGES, budget="elements:2000", policy="static-random", ranking="structural")
    reasons = {layer.parameter: layer.reason for layer in tuner.plan.table.frozen}
    assert "also used by standardise" in reasons["1.weight"]
    before = backward(dense)
    assert backward(sparse) == pytest.approx(before, abs=1e-6)
    assert max(layer_errors(dense, tuner).values()) < 1e-5


def test_the_weight_that_is_written_back_is_the_one_before_standardisation() -> None:
    plain, sparse = network(), network()
    tuner = trady.prepare(sparse, IMAGES, budget="elements:6000", policy="static-random", ranking="structural")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    backward(sparse)
    optimizer.step()
    selection = tuner.selection
    tuner.finish()
    for name, channels in selection.items():
        before, after = plain.get_parameter(f"{name}.weight"), sparse.get_parameter(f"{name}.weight")
        groups = plain.get_submodule(name).groups
        if groups == 1:
            others = torch.ones(before.shape[1], dtype=torch.bool)
            others[torch.from_numpy(channels.copy())] = False
            assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 3, 3)])
def test_the_function_itself_is_the_two_calls(kernel: tuple[int, ...]) -> None:
    x, weight = torch.randn(2, 4, *(5 for _ in kernel)), torch.randn(6, 2, *kernel)
    gain = torch.rand(6)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    mean = weight.flatten(1).mean(1).view(-1, 1, *(1 for _ in kernel))
    deviation = (weight.flatten(1).var(1, correction=0) + 1e-5).sqrt().view(mean.shape)
    hat = (weight - mean) / deviation * gain.view(mean.shape)
    torch.testing.assert_close(standardise(weight, gain, 1e-5), hat)
    torch.testing.assert_close(
        standardised_convolution(x, weight, None, gain, 1e-5, groups=2), convolve(x, hat, groups=2)
    )
