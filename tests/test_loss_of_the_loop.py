"""Peak budgets where the loss is not a cross entropy of scores: maps, images, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import in_layout, normal, seeded
from tests.tight_budget import least_of, peaks_in_a_tight_budget


class Maps(nn.Module):
    """Images to images of many channels: what the loss takes is most of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1)
        self.norm, self.middle = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(x + self.middle(F.silu(self.norm(x))))


TARGET = normal(8, 24, 16, 16, seed=1).sigmoid()


def _dice(output: Tensor) -> Tensor:
    shares = output.softmax(1)
    return 1 - (2 * (shares * TARGET).sum((2, 3)) / (shares.square() + TARGET.square()).sum((2, 3))).mean()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean squared error": lambda output: F.mse_loss(output, TARGET),
    "absolute": lambda output: F.l1_loss(output, TARGET),
    "smooth": lambda output: F.smooth_l1_loss(output, TARGET),
    "binary cross entropy": lambda output: F.binary_cross_entropy(output.sigmoid(), TARGET),
    "dice": _dice,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["default", "channels_last"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_prepare_is_told_of_is_in_the_budget(name: str, layout: torch.memory_format) -> None:
    model, x = in_layout(seeded(Maps), layout), normal(8, 3, 16, 16).to(memory_format=layout)
    limit, measured, predicted = peaks_in_a_tight_budget(model, x, LOSSES[name], LOSSES[name])
    assert measured <= limit
    assert abs(predicted / measured - 1) < 0.01


def test_a_loss_that_nobody_told_of_may_leave_the_budget() -> None:
    """What ``loss=`` is for: this loss takes more than the cross entropy that is expected."""
    limit, measured, _ = peaks_in_a_tight_budget(seeded(Maps), normal(8, 3, 16, 16), _dice, None)
    assert measured > limit


def test_labels_are_cut_with_the_batch() -> None:
    model, x = seeded(Maps), normal(8, 3, 16, 16)
    options: dict[str, Any] = {"policy": "dynamic-random", "micro_batch": 2, "loss": LOSSES["absolute"]}
    limit = int(1.05 * least_of(lambda: trady.prepare(model, x, budget="peak:1 B", **options)))
    tuner = trady.prepare(model, x, budget=f"peak:{limit} B", **options)

    def step() -> None:
        for part, target in zip(x.split(2), TARGET.split(2), strict=True):
            (F.l1_loss(model(part), target) / 4).backward()
        for _, parameter in tuner.named_parameters():
            parameter.grad = None

    step()
    measured = tuner.ledger(step, inference=False).peak_bytes
    assert tuner.plan.predicted_peak_bytes is not None
    assert -0.01 < tuner.plan.predicted_peak_bytes / measured - 1 < 0.03
    tuner.finish()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda output: F.mse_loss(output, TARGET, reduction="none"), r"tensor of shape \(8, 24, 16, 16\).*a scalar"),
        (lambda output, target: output.mean(), "takes the output alone"),
        (lambda output: F.mse_loss(output, TARGET[:, :3]), "cannot be computed from the model's output"),
        (lambda output: output.mean() if float(output.mean()) > 0 else output.sum(), "must not branch on values"),
        (lambda output: 1.0, "gives float"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(loss: Any, says: str) -> None:
    with pytest.raises(trady.ModelError, match=says):
        trady.prepare(seeded(Maps), normal(8, 3, 16, 16), budget="100 MiB", loss=loss)


def test_finetune_plans_with_its_loss() -> None:
    data: Any = list(zip(normal(16, 3, 16, 16), normal(16, 24, 16, 16, seed=1).sigmoid(), strict=True))
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "out": None, "progress": False}

    def least(**loss: Any) -> int:
        return least_of(lambda: trady.finetune(seeded(Maps), data, data, budget="peak:1 B", **options, **loss))

    assert least(loss=lambda output, labels: (output.softmax(1) * labels).exp().mean()) > least()


class Graph(nn.Module):
    """Messages along edges: indices are kept many times over, in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            messages = layer(x).index_select(0, edges[0])
            x = torch.tanh(torch.zeros_like(x).scatter_add(0, edges[1][:, None].expand_as(messages), messages)) + x
        return self.head(x)


def test_an_index_that_is_read_often_counts_once() -> None:
    edges = torch.randint(0, 10, (2, 200), generator=torch.Generator().manual_seed(0))
    limit, measured, predicted = peaks_in_a_tight_budget(
        seeded(Graph), {"x": normal(10, 6), "edges": edges}, lambda output: F.log_softmax(output, -1).mean(), None
    )
    assert measured <= limit
    assert abs(predicted / measured - 1) < 0.01


def test_a_model_without_weights_is_planned_with_the_loss_like_one_with_them() -> None:
    x, loss = normal(8, 3, 16, 16), LOSSES["mean squared error"]
    plans = [
        trady.plan(model, x, budget="peak:2 MiB", policy="dynamic-random", loss=loss)
        for model in (seeded(Maps), seeded(Maps).to("meta"))
    ]
    assert plans[0].predicted_peak_bytes == plans[1].predicted_peak_bytes
