"""The ranking that a tuner learns while it trains, or is given."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Residual, freeze_norms, gradient_of, normal, seeded
from tests.tuned import data, prepared
from trady.ranking.scores import layer_score


class OwnLoss(nn.Module):
    """Takes the labels with the batch, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), labels)


def test_a_ledger_remembers_the_labels_of_a_model_with_its_own_loss() -> None:
    model = seeded(OwnLoss, 0)
    x, labels = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 0])
    tuner = trady.prepare(model, (x, labels), budget="update:1 MiB")
    ledger = tuner.ledger(lambda: model(x, labels).backward())
    assert ledger.inference_peak_bytes is not None
    assert ledger.input_bytes == x.nbytes + labels.nbytes
    tuner.finish()


class Deep(nn.Module):
    """Layers whose gradients differ by orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 8, 12, 12, 16, 16]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 + i % 2, padding=1, bias=False) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(16, 5)
        for i, norm in enumerate(self.norms):
            nn.init.constant_(norm.get_parameter("weight"), 0.4 + 0.5 * (i % 3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


def offline(model: nn.Module, table: trady.ChannelTable, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Layer RGN from the dense gradients, averaged over batches."""
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    squares = {layer.name: np.zeros(layer.channels) for layer in table}
    for x, y in batches:
        dense.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        for layer in table:
            gradient = gradient_of(dense.get_parameter(layer.parameter))
            squares[layer.name] += gradient.double().square().sum((0, 2, 3)).numpy() / len(batches)
    return {layer.name: layer_score(squares[layer.name], layer, "rgn") for layer in table}


def test_the_online_ranking_settles_on_what_all_gradients_say() -> None:
    batches = [(normal(16, 3, 16, 16, seed=s), torch.arange(16).remainder(5)) for s in range(10)]
    model = seeded(Deep)
    tuner = trady.prepare(model, batches[0][0], budget="elements:4000")
    assert tuner.plan.ranking == "online"
    assert set(tuner.plan.pool) == set(tuner.plan.table.names)
    truth = trady.LayerRanking(offline(model, tuner.plan.table, batches))
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.0))
    digests = []
    for step in range(60):
        x, y = batches[step % 10]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(tuner.selection.digest)
    tuner.resample(1)
    learnt = tuner.ranking
    assert learnt is not None
    assert learnt.source == "online"
    assert learnt.spearman(truth) >= 0.8
    found, expected = set(tuner.plan.pool), set(truth.top(0.97))
    assert len(found & expected) >= len(expected) - 1
    assert len(set(digests)) > 5  # drawn again while it was learnt
    assert set(tuner.selection) <= found
    tuner.finish()


def test_the_ranking_in_the_making_is_part_of_the_state() -> None:
    model = seeded(Residual)
    tuner = prepared(model, policy="trady")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.0))
    for x, y in data()[:5]:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = json.loads(json.dumps(tuner.state_dict()["meta"]))
    assert state["online"]["batches"] == 5
    twin = prepared(policy="trady")
    twin.load_state_dict({"meta": state, "tensors": tuner.delta()})
    assert twin.ranking == tuner.ranking
    assert twin.selection == tuner.selection
    assert twin.resample(1) == tuner.resample(1)
    assert twin.plan.pool == tuner.plan.pool
    tuner.finish()
    twin.finish()


def test_a_given_ranking_makes_the_pool_at_once() -> None:
    names = prepared_names()
    scores = {name: (100.0 if name in ("stem.0", "blocks.1.conv2") else 0.1) for name in names}
    tuner = prepared(policy="trady", ranking=trady.LayerRanking(scores))
    assert set(tuner.plan.pool) == {"stem.0", "blocks.1.conv2"}
    for epoch in range(3):
        assert set(tuner.resample(epoch)) <= {"stem.0", "blocks.1.conv2"}
    tuner.finish()


def prepared_names() -> tuple[str, ...]:
    tuner = prepared()
    names = tuner.plan.table.names
    tuner.finish()
    return names
