"""The automatic head: what reads the output, not what comes last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trady
from tests.models import normal, seeded


def head_of(kind: type[nn.Module], x: Tensor | None = None) -> tuple[str, ...]:
    given = normal(4, 8) if x is None else x
    return trady.plan(seeded(kind), given, budget="elements:100", ranking="structural").head


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.pooler = nn.Linear(8, 3), nn.Linear(8, 8)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


class UnreadPooler(Body):
    """The pooler comes last and nobody gets what it makes."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        scores = self.head(hidden)
        self.pooler(hidden)
        return scores


class AuxiliaryFirst(Body):
    """Two classifiers, as of torchvision's segmentation models."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = torch.relu(self.first(x))
        return {"out": self.head(torch.relu(self.second(early))), "aux": self.auxiliary(early)}


class Shared(Body):
    """One head for several outputs, as of a detector's decoder layers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = torch.relu(self.first(x))
        return self.head(early), self.head(torch.relu(self.second(early)))


class ReadsItself(Body):
    """The last layer is called before too, inside of the body: it is no head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(torch.relu(self.second(x)))))


class ResidualEnd(Body):
    """The output is a sum of what several layers have made."""

    def forward(self, x: Tensor) -> Tensor:
        early = self.first(x)
        return early + self.second(torch.relu(early))


class InEveryStage(Body):
    """Feature maps of stages: each is read by the next one's weights but the last."""

    def forward(self, x: Tensor) -> list[Tensor]:
        one = torch.relu(self.first(x))
        two = torch.relu(self.second(one))
        return [one, two, torch.relu(self.pooler(two))]


class WithLoss(Body):
    """The loss is an output as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.body(x))
        return nn.functional.cross_entropy(scores, torch.zeros(len(x), dtype=torch.int64)), scores


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (UnreadPooler, ("head",)),
        (AuxiliaryFirst, ("head", "auxiliary")),
        (Shared, ("head",)),
        (ReadsItself, ()),
        (ResidualEnd, ()),
        (InEveryStage, ("pooler",)),
        (WithLoss, ("head",)),
    ],
)
def test_it_is_what_an_output_is_made_by_and_no_weight_reads_from(
    kind: type[nn.Module], expected: tuple[str, ...]
) -> None:
    assert set(head_of(kind)) == set(expected)


def test_a_head_that_is_called_twice_gets_the_whole_gradient() -> None:
    model, plain = seeded(Shared), seeded(Shared)
    tuner = trady.prepare(model, normal(4, 8), budget="elements:100", ranking="structural")
    for one in (model, plain):
        first, second = one(normal(4, 8))
        (first.square().sum() + second.sum()).backward()
    expected = dict(plain.named_parameters())
    head = {name: p for name, p in tuner.named_parameters() if name.startswith("head")}
    assert set(head) == {"head.weight", "head.bias"}
    for name, parameter in head.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad)
    tuner.finish()


class Fused(torch.autograd.Function):
    """Scores and their loss in one, as fused heads of language models."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.T).logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        scores = torch.softmax(hidden @ weight.T, -1) * gradients[0].unsqueeze(-1)
        return scores @ weight, scores.flatten(0, -2).T @ hidden.flatten(0, -2)


class FusedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scores = nn.Linear(8, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        made: Tensor = Fused.apply(hidden, self.scores.weight)  # type: ignore[no-untyped-call, unused-ignore]
        return made


def test_a_language_models_fused_head_is_none_and_the_layer_below_is_not_taken_for_it() -> None:
    assert head_of(FusedLanguageModel, torch.randint(0, 50, (2, 6))) == ()


def test_the_plan_says_which_head_was_found_or_why_there_is_none() -> None:
    found = trady.plan(seeded(AuxiliaryFirst), normal(4, 8), budget="elements:100", ranking="structural")
    none = trady.plan(seeded(ResidualEnd), normal(4, 8), budget="elements:100", ranking="structural")
    assert "head, auxiliary" in " ".join(str(found).split())
    assert 'name one as head="..."' in " ".join(str(none).split())
