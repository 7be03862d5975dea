"""Layers that a person keeps from training: flags before ``prepare``, ``train=`` and ``freeze=``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trady
from tests.command import trady_here
from tests.models import seeded
from tests.small_task import StopAfter, small_data, small_net
from trady.errors import CheckpointError, ModelError
from trady.policies.registry import policy_names


class Four(nn.Module):
    """Four convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
ALL = {f"body.{place}.weight" for place in (0, 2, 4, 6)}


def changed(model: nn.Module, epochs: int = 4, **options: Any) -> set[str]:
    """Train, and name the tensors that are others than before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuner = trady.prepare(model, X, **{"budget": "elements:100000", "ranking": "structural", **options})
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.5))
    for epoch in range(epochs):
        if tuner.observation_due:
            tuner.observe([(X, Y)], F.cross_entropy)
        tuner.resample(epoch)
        for _ in range(2):
            F.cross_entropy(tuner.model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
    tuner.finish()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def weights(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("body")}


def frozen(*places: int, head: bool = False) -> Four:
    model = seeded(Four)
    for place in places:
        model.body[place].requires_grad_(False)
    model.classifier.requires_grad_(not head)
    return model


def test_without_a_wish_every_layer_may_train() -> None:
    assert weights(changed(frozen())) == ALL


@pytest.mark.parametrize("policy", sorted(set(policy_names()) - {"head", "sparse-update", "full"}))
def test_no_policy_trains_a_layer_whose_flag_is_off(policy: str) -> None:
    model = frozen(0, 4)
    found = changed(model, policy=policy)
    assert weights(found) <= {"body.2.weight", "body.6.weight"}
    assert weights(found)
    assert "classifier.weight" in found
    assert [p.requires_grad for p in model.body.parameters()] == [False, False, True, True, False, False, True, True]


def test_the_policy_full_trains_the_others_alone() -> None:
    assert weights(changed(frozen(0, 4), policy="full", budget=None)) == {"body.2.weight", "body.6.weight"}


def test_a_ranking_that_is_learnt_online_leaves_them_out() -> None:
    model = frozen(0, 4)
    tuner = trady.prepare(model, X, budget="elements:600", ranking="online")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    for _ in range(80):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert set(tuner.selection) <= {"body.2", "body.6"}
    tuner.resample(1)
    assert set(tuner.plan.pool) <= {"body.2", "body.6"}
    tuner.finish()


def test_a_last_layer_that_is_frozen_is_no_head() -> None:
    found = changed(frozen(head=True))
    assert "classifier.weight" not in found
    assert weights(found) == ALL
    assert "classifier.weight" in changed(frozen(head=True), head="classifier"), "naming it is a wish too"


def test_all_frozen_but_a_new_head_trains_the_head() -> None:
    assert changed(frozen(0, 2, 4, 6)) == {"classifier.weight", "classifier.bias"}


def test_nothing_left_to_train_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"every layer of this Four is frozen by hand: set requires_grad_\(True\)"):
        trady.prepare(frozen(0, 2, 4, 6, head=True), X, budget="elements:1000")


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"train": "body.2"}, {"body.2.weight"}),
        ({"train": ["body.2", "body.6.weight"]}, {"body.2.weight", "body.6.weight"}),
        ({"train": "body.[46]"}, {"body.4.weight", "body.6.weight"}),
        ({"freeze": "body.0"}, ALL - {"body.0.weight"}),
        ({"freeze": ["body.0*", "body.6"]}, {"body.2.weight", "body.4.weight"}),
        ({"train": "body", "freeze": "body.4"}, ALL - {"body.4.weight"}),
    ],
)
def test_names_and_patterns_say_what_trains(wish: dict[str, Any], expected: set[str]) -> None:
    assert weights(changed(frozen(), **wish)) == expected


def test_modules_say_it_too_and_a_wish_goes_before_flags() -> None:
    model = frozen(0, 2)
    assert weights(changed(model, train=[model.body[0], model.body[6]])) == {"body.0.weight", "body.6.weight"}
    model = frozen()
    assert weights(changed(model, freeze=model.body[0])) == ALL - {"body.0.weight"}


@pytest.mark.parametrize("word", ["train", "freeze"])
def test_a_name_that_matches_nothing_is_refused_with_those_there_are(word: str) -> None:
    with pytest.raises(
        ModelError, match=rf"{word}='encoder' matches no parameter of this Four; its modules are body.0"
    ):
        trady.prepare(frozen(), X, budget="elements:1000", **{word: "encoder"})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"{word}='Linear' matches no parameter"):
        trady.prepare(frozen(), X, budget="elements:1000", **{word: nn.Linear(2, 2)})  # type: ignore[arg-type]


def test_the_plan_says_it_and_keeps_it() -> None:
    plan = trady.plan(frozen(0, 4), X, budget="elements:2000", policy="dynamic-random")
    assert plan.held == ("body.0", "body.4")
    assert set(plan.pool) == {"body.2", "body.6"}
    assert "frozen by hand" in str(plan)
    assert trady.Plan.from_json(plan.to_json()) == plan
    assert "held" not in trady.plan(frozen(), X, budget="elements:2000").to_json()


def test_a_plan_of_a_model_that_trains_knows_the_flags_of_before() -> None:
    model = frozen(0, 4)
    tuner = trady.prepare(model, X, budget="elements:2000", policy="dynamic-random")
    assert trady.plan(model, X, budget="elements:2000", policy="dynamic-random").held == ("body.0", "body.4")
    tuner.finish()


def test_a_peak_budget_is_kept_and_all_of_it_goes_to_the_others() -> None:
    model = frozen(0, 4)
    least = trady.plan(model, X, budget="peak:10 MiB").least_peak_bytes
    assert least is not None
    budget = int(least * 1.05)
    tuner = trady.prepare(model, X, budget=f"peak:{budget} B", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))

    def step() -> None:
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert set(tuner.selection) <= {"body.2", "body.6"}
    assert tuner.ledger(step).peak_bytes <= budget
    tuner.finish()


def finetune(out: Path, progress: Any = False, **options: Any) -> trady.Result:
    return trady.finetune(
        small_net(), small_data(40, 0), small_data(16, 1), out=out, epochs=3, batch_size=8, progress=progress,
        **{"budget": "elements:2000", **options},
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["trady", "full"])
def test_a_run_keeps_them_and_is_resumed_with_the_same_wish_only(tmp_path: Path, policy: str) -> None:
    before = small_net().state_dict()
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, StopAfter(1), freeze="features.0", policy=policy)
    with pytest.raises(CheckpointError, match=r"freeze was 'features\.0', is now None"):
        finetune(tmp_path, resume=True, policy=policy)
    after = finetune(tmp_path, resume=True, freeze="features.0", policy=policy).model.state_dict()
    assert torch.equal(before["features.0.weight"], after["features.0.weight"])
    assert not torch.equal(before["features.3.weight"], after["features.3.weight"])


def test_the_command_line_takes_names() -> None:
    given = [
        "plan",
        "tests.small_task:small_net",
        "--image-size",
        "12",
        "--batch-size",
        "4",
        "--budget",
        "elements:900",
    ]
    shown = trady_here(*given, "--freeze", "features.0", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["held"] == ["features.0"]
    wrong = trady_here(*given, "--train", "nothing")
    assert wrong.returncode == 2
    assert "--train nothing matches no parameter" in wrong.stderr


def test_the_flag_of_a_layer_that_stays_says_so_and_unfreezing_it_later_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.Linear(16, 3))
    model[0].requires_grad_(False)
    x, y = torch.randn(6, 8), torch.arange(6) % 3
    tuner = trady.prepare(model, x, budget="elements:1000", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model[0].requires_grad_(True)
    with pytest.raises(
        ModelError, match=r"0 was frozen when the model was prepared.*tuner.finish\(\) and trady.prepare"
    ):
        model(x)
    model[0].requires_grad_(False)
    model(x)
    tuner.finish()
    model.requires_grad_(True)
    before = model.get_parameter("0.weight").clone()
    tuner = trady.prepare(model, x, budget="elements:100000", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.5))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(tuner.finish().get_parameter("0.weight"), before)
