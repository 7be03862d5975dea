"""Models that look at values: checks, distributions, indices made of masks, matchings, losses over labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import trady
from tests.against_dense import armed, assert_dense_gradients, dense_gradients, gradients
from tests.models import relative_error
from trady.errors import ModelError

X = torch.rand(6, 12, dtype=torch.float64)


class Looks(nn.Module):
    place: Tensor

    def __init__(self, look: Callable[[Looks, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.look, self.seen = look, 0.0
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.look(self, F.gelu(self.first(x))))))


def _asserts(model: Looks, x: Tensor) -> Tensor:
    assert torch.isfinite(x).all(), "not finite"
    return x


def _clamps(model: Looks, x: Tensor) -> Tensor:
    return x.clamp(-1e4, 1e4) if torch.isinf(x).any() or torch.isnan(x).any() else x


def _logs(model: Looks, x: Tensor) -> Tensor:
    model.seen = x.detach().cpu().numpy().mean() + x.mean().item() + x.detach().max().tolist()
    return x


def _masks(model: Looks, x: Tensor) -> Tensor:
    chosen = x[x[:, 0] > x[:, 0].median()]
    return torch.cat([chosen, x]) * 2


def _samples(model: Looks, x: Tensor) -> Tensor:
    return Normal(x, F.softplus(x) + 0.1).rsample()


def _scores(model: Looks, x: Tensor) -> Tensor:
    return x + Categorical(logits=x).entropy()[:, None]


def _matches(model: Looks, x: Tensor) -> Tensor:
    order = sorted(range(len(x)), key=x.detach()[:, 0].tolist().__getitem__)
    return x[torch.tensor(order)] + x


def _branches(model: Looks, x: Tensor) -> Tensor:
    return x if x.sum() > 1e6 else x * 0.5


def _reads_a_buffer(model: Looks, x: Tensor) -> Tensor:
    place = int(model.place)
    model.place[0] = (place + 1) % len(x)
    return x.roll(place % 2, 0)


LOOKS = [_asserts, _clamps, _logs, _masks, _samples, _scores, _matches, _branches, _reads_a_buffer]


def _loss(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    return model(X).square().sum()


def _looking(look: Callable[[Looks, Tensor], Tensor]) -> Looks:
    torch.manual_seed(0)
    return Looks(look).double()


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("look", LOOKS)
def test_a_model_that_looks_at_values_trains_exactly(look: Callable[[Looks, Tensor], Tensor], recompute: str) -> None:
    model = _looking(look)
    tuner = armed(model, X, recompute=recompute)
    assert tuner.plan.table.names == ("first", "second")
    assert (model.seen, int(model.place)) == (0.0, 0)
    for _ in range(2):
        expected = dense_gradients(copy.deepcopy(model), tuner, _loss)
        for parameter in tuner.parameters():
            parameter.grad = None
        _loss(model).backward()
        found = gradients(tuner)
        assert found.keys() == expected.keys()
        assert all(relative_error(found[key], expected[key]) < 1e-10 for key in expected)
    tuner.finish()


@pytest.mark.parametrize("look", LOOKS)
def test_its_peak_is_predicted_and_kept(look: Callable[[Looks, Tensor], Tensor]) -> None:
    model = _looking(look)
    tuner = trady.prepare(model, X, budget="peak:40 KiB", ranking="structural", loss=lambda y: y.square().sum())

    def step() -> None:
        _loss(model).backward()
        for parameter in tuner.parameters():
            parameter.grad = None

    peak, predicted = tuner.ledger(step, inference=False).peak_bytes, tuner.plan.predicted_peak_bytes
    assert predicted is not None
    assert 0.8 * predicted < peak <= predicted <= 40 * 1024
    tuner.finish()


def _transcribed(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(x, labels)
    return loss


def test_a_loss_over_sequences_of_labels_inside_of_the_model_trains_exactly() -> None:
    class Transcribes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            scores = self.head(F.gelu(self.first(x))).log_softmax(-1)
            known = labels >= 0
            steps = torch.full((len(x),), x.shape[1])
            return F.ctc_loss(scores.transpose(0, 1), labels.masked_select(known), steps, known.sum(1))

    torch.manual_seed(0)
    model, x = Transcribes().double(), torch.rand(2, 9, 12, dtype=torch.float64)
    labels = [torch.tensor([[1, 2, 3], [4, -1, -1]]), torch.tensor([[1, -1, -1], [4, 3, 2]])]
    tuner = armed(model, (x, labels[0]))
    for each in labels:
        assert_dense_gradients(model, tuner, partial(_transcribed, x=x, labels=each))
    tuner.finish()


def test_a_check_on_the_meta_device_is_taken_to_hold() -> None:
    for look in (_asserts, _clamps, _samples):
        table = trady.plan(_looking(look).to("meta"), X.to("meta"), budget="elements:900", ranking="structural").table
        assert table.names == ("first", "second")


@pytest.mark.parametrize(("look", "words"), [(_matches, "x.detach()[:, 0].tolist()"), (_branches, "x.sum() > 1e6")])
def test_what_is_refused_says_the_line_and_the_way_out(look: Callable[[Looks, Tensor], Tensor], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        trady.plan(_looking(look).to("meta"), X.to("meta"), budget="elements:900")
    said = str(caught.value)
    assert words in said
    assert "test_values.py:" in said
    assert "real example" in said


def test_an_error_of_the_model_is_shown_with_its_line() -> None:
    def wrong(model: Looks, x: Tensor) -> Any:
        return x @ torch.zeros(3, 3, dtype=x.dtype)

    with pytest.raises(ModelError, match=r"test_values\.py:\d+: return x @ torch\.zeros"):
        trady.plan(_looking(wrong), X, budget="elements:900")
