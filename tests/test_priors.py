"""Rankings that are known before training: by structure, for any input size, and never another structure's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trady
from tests.command import trady_here
from trady.analysis.model_analysis import analyse_model
from trady.errors import RankingError
from trady.ranking.online import OnlineRanking
from trady.ranking.priors import find_prior, prior_folder, ranking_for, save_prior, shipped_priors
from trady.ranking.ranking import LayerRanking
from trady.ranking.structural import structural_ranking

SRC = """
from torch import nn
def net(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(6, classes))
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADY_PRIORS", str(tmp_path / "priors"))


class Net(nn.Module):
    """The same layers, whatever they are called."""

    def __init__(self, names: tuple[str, ...] = ("stem", "mix"), width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        self.add_module(names[0], nn.Conv2d(3, width, 3, stride=2, padding=1))
        self.add_module(names[1], nn.Conv2d(width, 6, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = F.relu(self.get_submodule(name)(x))
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def batches(size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, size, size, generator=generator), torch.randint(4, (4,), generator=generator))
        for _ in range(3)
    ]


def measured(model: nn.Module, size: int = 16) -> LayerRanking:
    return trady.rank(model, batches(size), F.cross_entropy)


def test_a_kept_ranking_is_found_by_structure_under_other_names() -> None:
    ranking = replace(measured(Net()), measured_on="two blobs")
    save_prior(ranking)
    plan = trady.plan(Net(("first", "second")), batches()[0][0], budget="elements:2000")
    assert plan.ranking == "prior"
    assert plan.measured_on == "two blobs"
    renamed = {"stem": "first", "mix": "second"}
    assert plan.pool == tuple(renamed[name] for name in ranking.top())
    assert "measured on two blobs" in str(plan)


def test_a_prior_of_another_structure_is_never_applied() -> None:
    save_prior(measured(Net()))
    assert trady.plan(Net(width=9), batches()[0][0], budget="elements:2000").ranking == "online"


def test_a_prior_is_taken_to_another_input_size_by_its_norms() -> None:
    small, large = measured(Net(), 16), analyse_model(Net(), batches(64)[0][0]).table
    save_prior(small)
    found = find_prior(large)
    assert found is not None
    for layer in large:
        norm = small.scores[layer.name] * small.elements[layer.name] * layer.channels
        assert found.scores[layer.name] == pytest.approx(norm / (layer.channels * layer.elements))
    assert found.scores != small.scores


def test_a_ranking_measured_at_another_size_is_corrected_when_it_is_given() -> None:
    small = measured(Net(), 16)
    table = analyse_model(Net(), batches(64)[0][0]).table
    given = ranking_for(table, small)
    assert given == small.at(table)
    assert given != small
    assert small.at(analyse_model(Net(), batches(16)[0][0]).table) is small


def test_the_words_online_and_structural_go_before_a_prior() -> None:
    save_prior(measured(Net()))
    example = batches()[0][0]
    assert trady.plan(Net(), example, budget="elements:2000", ranking="online").ranking == "online"
    plan = trady.plan(Net(), example, budget="elements:2000", ranking="structural")
    assert plan.ranking == "structural"
    assert "guess" in str(plan)


def test_an_unknown_word_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RankingError, match="'online', 'structural'"):
        trady.plan(Net(), batches()[0][0], budget="elements:2000", ranking="onlin")  # type: ignore[arg-type]


def test_a_prior_of_ones_own_goes_before_a_shipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = measured(Net())
    backwards = replace(ranking, scores=dict(zip(ranking.scores, reversed(list(ranking.scores.values())), strict=True)))
    monkeypatch.setattr("trady.ranking.priors.shipped_priors", lambda: {"net": ranking})
    table = analyse_model(Net(), batches()[0][0]).table
    found = find_prior(table)
    assert found is not None
    assert found.scores == ranking.scores
    save_prior(backwards)
    own = find_prior(table)
    assert own is not None
    assert own.scores == backwards.scores


def test_a_damaged_prior_is_an_error_that_names_the_file() -> None:
    path = save_prior(measured(Net()))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(RankingError, match=path.name):
        trady.plan(Net(), batches()[0][0], budget="elements:2000")


def test_a_ranking_that_does_not_say_its_structure_is_not_kept() -> None:
    with pytest.raises(RankingError, match=r"trady\.rank"):
        save_prior(LayerRanking({"stem": 1.0}))
    assert not prior_folder().exists()


def test_every_shipped_prior_says_what_it_was_measured_on() -> None:
    priors = shipped_priors()
    assert {"efficientnet-lite0", "mbv2-w0.35", "mcunet-5fps", "minilm-l6"} <= set(priors)
    assert len({prior.structure for prior in priors.values()}) == len(priors)
    for prior in priors.values():
        assert prior.measured_on
        assert prior.source == "prior"
        assert prior.elements.keys() == prior.scores.keys()


def test_efficientnet_lite0_trains_by_its_prior() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    from trady.training.models.load import load_model

    model = load_model("efficientnet-lite0", 10).model
    plan = trady.plan(model, torch.zeros(2, 3, 64, 64), budget="elements:280000")
    assert plan.ranking == "prior"
    assert "ImageNet" in plan.measured_on
    assert 0 < len(plan.pool) < len(plan.table)


def test_a_layer_that_was_never_seen_gets_its_share_of_the_guess() -> None:
    table = analyse_model(Net(), batches()[0][0]).table
    online, guess = OnlineRanking(table), structural_ranking(table).scores
    online.observe({"stem": np.array([4.0])})
    scores = online.ranking().scores
    assert scores["mix"] / scores["stem"] == pytest.approx(guess["mix"] / guess["stem"])


def test_trady_rank_leaves_a_prior_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_of_mine.py").write_text(SRC, encoding="utf-8")
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        x_train=rng.integers(0, 255, (32, 16, 16, 3), dtype=np.uint8),
        y_train=np.arange(32) % 4,
        x_test=rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8),
        y_test=np.arange(8) % 4,
    )

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def trady_cli(*words: str) -> str:
        done = trady_here(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    model = ("net_of_mine:net", "--image-size", "16")
    plan = ("plan", *model, "--classes", "4", "--batch-size", "4", "--budget", "elements:900", "--json")
    rank = ("rank", "net_of_mine:net", "data.npz", "--image-size", "16", "--batches", "2", "--batch-size", "4")
    for without in ((), ("--no-prior",)):
        assert "--as-prior keeps it for all later runs" in trady_cli(*rank, *without)
        assert json.loads(trady_cli(*plan))["ranking"] == "online"
    assert "kept as the prior of this structure" in trady_cli(*rank, "--as-prior")
    found = json.loads(trady_cli(*plan))
    assert found["ranking"] == "prior"
    assert found["measured_on"] == "data.npz, 2 batches of 4"
