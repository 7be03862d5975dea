"""Rankings: scores, the top layers, files, and layers of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.ranked_layers import TABLE, layer, table_of
from trady.errors import FileError, RankingError, ResourceError
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.ranking.scores import channel_rgn, channel_scores, layer_rgn, layer_score, spearman, top_layers

scores_of_layers = st.dictionaries(st.text(max_size=5), st.floats(0, allow_infinity=False), min_size=1, max_size=12)


# -- scores --------------------------------------------------------------------------------------


def test_layer_rgn_is_equation_8_the_sum_of_the_channels_rgn() -> None:
    squared = np.array([1.0, 4.0, 9.0])
    assert TABLE["a"].elements == 7
    assert layer_rgn(squared, TABLE["a"]) == pytest.approx(1 / 7 + 2 / 7 + 3 / 7)
    assert layer_rgn(squared, TABLE["a"]) == pytest.approx(channel_rgn(squared, TABLE["a"]).sum())
    assert layer_score(squared, TABLE["a"], "norm") == 1 + 2 + 3


def test_channel_rgn_is_the_norm_over_the_cost_of_the_channel() -> None:
    squared = np.array([1.0, 4.0, 9.0])
    np.testing.assert_allclose(channel_rgn(squared, TABLE["a"]), np.array([1, 2, 3]) / 7)
    np.testing.assert_allclose(channel_scores(squared, TABLE["a"], "norm"), [1, 2, 3])


def test_there_is_one_norm_for_each_channel() -> None:
    with pytest.raises(RankingError, match=r"shape \(2,\) for layer 'a'; it has 3 channels"):
        layer_rgn([1.0, 2.0], TABLE["a"])


# -- top-K ---------------------------------------------------------------------------------------


@given(scores=scores_of_layers, share=st.floats(0, 1, exclude_min=True))
def test_top_is_the_shortest_run_of_best_layers_that_reaches_the_share(scores: dict[str, float], share: float) -> None:
    from fractions import Fraction

    ranking = LayerRanking(scores)
    top = ranking.top(share)
    assert top == ranking.order[: len(top)]
    total = sum(map(Fraction, scores.values()))
    if total == 0:
        assert set(top) == set(scores)
        return
    wanted = Fraction(repr(share)) * total
    assert sum(Fraction(scores[name]) for name in top) >= wanted
    assert sum(Fraction(scores[name]) for name in top[:-1]) < wanted


def test_the_share_is_what_the_user_typed_not_its_binary_neighbour() -> None:
    equal = {str(i): 0.1 for i in range(100)}
    for hundredths in range(1, 101):
        assert len(top_layers(equal, hundredths / 100)) == hundredths


def test_layers_come_by_falling_score_and_equal_ones_in_order_of_execution() -> None:
    ranking = LayerRanking({"a": 1.0, "b": 5.0, "c": 1.0, "d": 0.0})
    assert ranking.order == ("b", "a", "c", "d")
    assert ranking.top(0.72) == ("b", "a")
    assert ranking.top(1) == ("b", "a", "c")


def test_without_any_gradient_all_layers_are_top() -> None:
    assert LayerRanking({"a": 0.0, "b": 0.0}).top() == ("a", "b")


def test_scores_whose_sum_overflows_still_rank() -> None:
    assert LayerRanking({"a": 1.7e308, "b": 1.7e308, "c": 1.0}).top() == ("a", "b")


@pytest.mark.parametrize("share", [0, -0.1, 1.0001, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(RankingError, match="above 0 and at most 1"):
        LayerRanking({"a": 1.0}).top(share)


# -- rank correlation ------------------------------------------------------------------------------


@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30).filter(
        lambda pairs: len({a for a, _ in pairs}) > 1 and len({b for _, b in pairs}) > 1
    )
)
def test_spearman_is_scipys_ties_included(pairs: list[tuple[float, float]]) -> None:
    left, right = zip(*pairs, strict=True)
    assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_spearman_of_a_single_rank_is_defined() -> None:
    assert spearman([1.0, 1.0], [2.0, 2.0]) == 1
    assert spearman([1.0, 1.0], [2.0, 3.0]) == 0
    assert spearman([5.0], [7.0]) == 1


def test_rankings_compare_layer_by_layer_whatever_their_order() -> None:
    ranking = LayerRanking({"a": 1.0, "b": 2.0, "c": 3.0})
    assert ranking.spearman(LayerRanking({"c": 30.0, "b": 20.0, "a": 10.0})) == 1
    assert ranking.spearman(LayerRanking({"a": 3.0, "b": 2.0, "c": 1.0})) == -1
    with pytest.raises(RankingError, match=r"names layers that do not exist here: z and misses layers: b, c"):
        ranking.spearman(LayerRanking({"a": 1.0, "z": 1.0}))


# -- LayerRanking ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scores": {"a": float("nan")}}, "score of layer 'a' is nan"),
        ({"scores": {"a": float("inf")}}, "score of layer 'a' is inf"),
        ({"scores": {"a": -1.0}}, "score of layer 'a' is -1.0"),
        ({"scores": {"a": "1"}}, "it is a number"),
        ({"scores": {"a": True}}, "it is a number"),
        ({"scores": {"a": 10**400}}, "finite"),
        ({"scores": {"a": 1.0}, "channels": {"a": (1.0, -2.0)}}, "a channel of layer 'a' is -2.0"),
        ({"scores": {"a": 1.0}, "channels": {"b": (1.0,)}}, "layers without a score: b"),
        ({"scores": {"a": 1.0}, "metric": "size"}, "metric 'size' does not exist; there are rgn, norm"),
        ({"scores": {"a": 1.0}, "source": "rumour"}, "source 'rumour' does not exist"),
        ({"scores": {"a": 1.0}, "batches": -1}, "batches is -1"),
        ({"scores": {"a": 1.0}, "structure": None}, "structure is None"),
    ],
)
def test_a_ranking_of_impossible_values_is_refused(values: Any, message: str) -> None:
    with pytest.raises(RankingError, match=message):
        LayerRanking(**values)


@given(
    scores=scores_of_layers,
    metric=st.sampled_from(["rgn", "norm"]),
    source=st.sampled_from(["measured", "online", "prior", "given"]),
    batches=st.integers(0, 10**6),
    data=st.data(),
)
def test_a_ranking_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory,
    scores: dict[str, float],
    metric: Any,
    source: Any,
    batches: int,
    data: Any,
) -> None:
    channels = data.draw(
        st.dictionaries(st.sampled_from(sorted(scores)), st.lists(st.floats(0, allow_infinity=False)).map(tuple))
    )
    ranking = LayerRanking(scores, metric, source, "0123", channels, batches)
    path = tmp_path_factory.mktemp("ranking") / "ranking.json"
    ranking.save(path)
    again = LayerRanking.load(path)
    assert again == ranking
    assert list(again.scores) == list(ranking.scores), "order of execution is kept"


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    LayerRanking({"a": 1.0}).save(path)
    LayerRanking({"b": 2.0}).save(str(path))
    assert LayerRanking.load(str(path)).scores == {"b": 2.0}
    assert [each.name for each in tmp_path.iterdir()] == ["ranking.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranking.json"
    LayerRanking({"a": 1.0}).save(path)

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(ResourceError, match=r"ranking\.json: the disk is full .*No space left.*are as they were"):
        LayerRanking({"b": 2.0}).save(path)
    assert LayerRanking.load(path).scores == {"a": 1.0}
    assert [each.name for each in tmp_path.iterdir()] == ["ranking.json"]


def test_a_folder_that_is_not_there_is_an_error_of_the_family(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file or directory"):
        LayerRanking({"a": 1.0}).save(tmp_path / "nowhere" / "ranking.json")
    with pytest.raises(RankingError, match="cannot read"):
        LayerRanking.load(tmp_path / "nowhere.json")


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    LayerRanking({"a": 1.0, "b": 0.5}, channels={"a": (0.1, 0.2)}).save(path)
    whole = path.read_text().rstrip()
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(RankingError, match=r"ranking\.json"):
            LayerRanking.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, this trady reads version 2 .*equation 8.*trady rank"),
        ({"version": 1}, "version 1, this trady reads version 2 .*equation 8.*measure it again with trady rank"),
        ({"norm": "running"}, "norm is 'running'; possible are 'frozen', 'batch', ''"),
        ({"format": "other"}, "no layer ranking"),
        ({"scores": {"a": float("nan")}}, "scores.a is nan, not a finite number"),
        ({"scores": {"a": float("inf")}}, "scores.a is inf, not a finite number"),
        ({"scores": {"a": -1}}, "not negative"),
        ({"scores": 5}, "is damaged"),
        ({"scores": [1.0]}, "is damaged"),
        ({"channels": [1.0]}, "is damaged"),
        ({"channels": {"a": 5}}, "is damaged"),
        ({"metric": []}, "metric"),
        ({"batches": 1.5}, "batches"),
    ],
)
def test_a_file_of_another_version_or_with_impossible_values_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({**LayerRanking({"a": 1.0}).to_json(), **change}))
    with pytest.raises(RankingError, match=message):
        LayerRanking.load(path)


@pytest.mark.parametrize("field", ["format", "version", "metric", "source", "structure", "batches", "scores", "norm"])
def test_a_file_that_lacks_a_field_is_refused(tmp_path: Path, field: str) -> None:
    data = LayerRanking({"a": 1.0}).to_json()
    del data[field]
    with pytest.raises(RankingError, match=field):
        LayerRanking.from_json(data)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"\x00"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ranking.json"
    path.write_bytes(content)
    with pytest.raises(RankingError, match=r"ranking\.json"):
        LayerRanking.load(path)


def test_a_ranking_of_another_model_names_the_layers_that_do_not_fit() -> None:
    with pytest.raises(RankingError, match=r"names layers that do not exist here: z and misses layers: c, d"):
        LayerRanking({"a": 1.0, "b": 1.0, "z": 1.0}).check(TABLE)
    with pytest.raises(RankingError, match=r"2 channels of layer 'a', the model 3"):
        LayerRanking(dict.fromkeys(TABLE.names, 1.0), channels={"a": (1.0, 2.0)}).check(TABLE)
    LayerRanking(dict.fromkeys(TABLE.names, 1.0), channels={"a": (1.0, 2.0, 3.0)}).check(TABLE)


# -- structure -------------------------------------------------------------------------------------


def test_the_structure_is_in_kinds_and_shapes_not_in_names_or_inputs() -> None:
    digest = structure_digest(table_of(layer("a"), layer("b", 5)))
    assert digest == structure_digest(table_of(layer("x", activation=9, tokens=7), layer("y", 5)))
    assert len(digest) == 16
    others = [
        table_of(layer("b", 5), layer("a")),
        table_of(layer("a"), layer("b", 6)),
        table_of(layer("a"), layer("b", 5, kind="addmm")),
        table_of(layer("a"), layer("b", 5, groups=5)),
        table_of(layer("a")),
    ]
    assert digest not in map(structure_digest, others)


def test_a_prior_is_adopted_under_the_names_of_the_model() -> None:
    there = table_of(layer("x"), layer("y", 5))
    here = table_of(layer("y"), layer("a", 5))
    prior = LayerRanking({"x": 1.0, "y": 2.0}, source="prior", structure=structure_digest(there))
    adopted = prior.adopted(here)
    assert dict(adopted.scores) == {"y": 1.0, "a": 2.0}
    assert adopted.source == "prior"
    with pytest.raises(RankingError, match="of structure"):
        prior.adopted(table_of(layer("x"), layer("y", 6)))
