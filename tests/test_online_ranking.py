"""The ranking that is learnt from the gradients of drawn channels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranked_layers import TABLE, layer, table_of
from trady.channels.table import ChannelTable
from trady.errors import RankingError
from trady.ranking.online import OnlineRanking
from trady.ranking.ranking import structure_digest
from trady.ranking.scores import layer_rgn, spearman
from trady.ranking.structural import structural_ranking


def online(table: ChannelTable = TABLE, **options: Any) -> OnlineRanking:
    return OnlineRanking(table, **options)


def everywhere(value: float, table: ChannelTable = TABLE) -> dict[str, Any]:
    return {each.name: np.full(each.channels, value) for each in table}


def gradients(rng: np.random.Generator, table: ChannelTable, means: dict[str, float]) -> dict[str, Any]:
    """Squares of heavy-tailed norms of every channel; the expectation of a layer's norms is ``means``."""
    return {each.name: (means[each.name] * rng.lognormal(-0.5, 1, each.channels)) ** 2 for each in table}


def test_online_estimates_are_unbiased_however_often_a_layer_is_drawn() -> None:
    rng = np.random.default_rng(0)
    means = {"a": 3.0, "b": 0.5, "c": 7.0, "d": 0.02}
    chance = {"a": 0.05, "b": 0.3, "c": 0.6, "d": 1.0}
    estimates = []
    for _ in range(300):
        state = online()
        for _ in range(60):
            full = gradients(rng, TABLE, means)
            state.observe(
                {
                    name: rng.choice(norms, size=rng.integers(1, min(4, norms.size) + 1), replace=False)
                    for name, norms in full.items()
                    if rng.random() < chance[name] or state.observations[name] == 0
                }
            )
        estimates.append([state.ranking().scores[name] for name in TABLE.names])
    truth = np.array([means[each.name] * each.channels / each.elements for each in TABLE])
    error = np.std(estimates, axis=0) / np.sqrt(300)
    assert (np.abs(np.mean(estimates, axis=0) - truth) < 4 * error).all()
    assert (error < 0.1 * truth).all(), "the test is sharp enough to see a bias of half"


def test_all_channels_observed_is_the_layer_rgn() -> None:
    rng = np.random.default_rng(1)
    full = gradients(rng, TABLE, dict.fromkeys(TABLE.names, 1.0))
    rgn, norm = online(), online(metric="norm")
    rgn.observe(full)
    norm.observe(full)
    for each in TABLE:
        assert rgn.ranking().scores[each.name] == pytest.approx(layer_rgn(full[each.name], each))
        assert norm.ranking().scores[each.name] == pytest.approx(np.sqrt(full[each.name]).sum())
    assert norm.ranking().metric == "norm"


def test_an_online_ranking_says_what_it_is() -> None:
    state = online()
    state.observe(everywhere(1.0))
    state.observe({})
    ranking = state.ranking()
    ranking.check(TABLE)
    assert (ranking.source, ranking.batches, ranking.structure) == ("online", 2, structure_digest(TABLE))
    assert tuple(ranking.scores) == TABLE.names


def test_layers_never_observed_have_a_guess_from_shapes_to_the_scale_of_the_others() -> None:
    state = online(metric="norm")
    state.observe({"a": [1.0], "b": [1.0]})
    scores = state.ranking().scores
    assert (scores["a"], scores["b"]) == (3, 40)
    guess = structural_ranking(TABLE).scores
    norm = {layer.name: guess[layer.name] * layer.elements for layer in TABLE}
    scale = (scores["a"] + scores["b"]) / (norm["a"] + norm["b"])
    assert (scores["c"], scores["d"]) == pytest.approx((scale * norm["c"], scale * norm["d"]))
    assert set(online().ranking().scores.values()) == {0.0}


def test_norms_that_are_not_finite_are_left_out_and_counted() -> None:
    state = online()
    state.observe({"a": [np.nan, 4.0, np.inf], "b": [np.inf]})
    assert state.ignored == 3
    assert state.observations == {"a": 1, "b": 0, "c": 0, "d": 0}
    assert state.ranking().scores["a"] == pytest.approx(2 * 3 / 7)
    for _ in range(3):
        state.observe({"a": [1.7e308]})
    assert state.ignored == 3
    assert np.isfinite(state.ranking().scores["a"])


def test_a_batch_of_zeros_counts() -> None:
    state = online()
    state.observe({"a": [4.0]})
    state.observe({"a": [0.0]})
    assert state.ranking().scores["a"] == pytest.approx(1 * 3 / 7)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"z": [1.0]}, "layer 'z', which the model lacks"),
        ({"a": [1.0] * 4}, r"shape \(4,\) in layer 'a'.*at most 3"),
        ({"a": [[1.0]]}, "shape"),
        ({"a": [-1.0]}, "negative squared norm in layer 'a'"),
    ],
)
def test_an_impossible_observation_is_refused_and_leaves_no_trace(norms: Any, message: str) -> None:
    state = online()
    before = state.to_json()
    with pytest.raises(RankingError, match=message):
        state.observe({"b": [1.0], **norms})
    assert state.to_json() == before


def test_a_steady_ranking_settles_after_the_window() -> None:
    state = online(window=8, min_observations=4)
    settled = []
    for _ in range(12):
        state.observe({"a": [1.0], "b": [2.0], "c": [3.0], "d": [4.0]})
        settled.append(state.settled)
    assert settled == [False] * 8 + [True] * 4


def test_a_ranking_waits_for_the_layer_observed_least() -> None:
    state = online(window=2, min_observations=3)
    steady = {"a": [1.0], "b": [2.0], "c": [3.0]}
    for _ in range(10):
        state.observe(steady)
    for expected in (False, False, False, True):
        assert state.settled is expected
        state.observe({**steady, "d": [4.0]})
    assert state.settled


def test_layers_that_cannot_be_drawn_are_not_waited_for() -> None:
    state = online(drawable=("a", "b", "c"), window=2)
    for _ in range(5):
        state.observe({"a": [1.0], "b": [2.0], "c": [3.0]})
    assert state.settled


def test_a_ranking_that_still_moves_does_not_settle() -> None:
    state = online(metric="norm", window=4, min_observations=1)
    for _ in range(5):
        state.observe({"a": [100.0], "b": [2.0], "c": [3.0], "d": [1.0]})
    assert state.settled
    state.observe({"a": [0.0], "b": [200.0], "c": [3.0], "d": [1.0]})
    assert not state.settled, "the order changed"


def test_the_same_order_with_another_pool_does_not_settle() -> None:
    table = table_of(layer("a", 1), layer("b", 1))
    state = online(table, window=1, min_observations=1)
    state.observe({"a": [1e4], "b": [4.0]})
    state.observe({"a": [1e4], "b": [8100.0]})
    assert spearman(*state.to_json()["history"]) == 1
    assert not state.settled


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    before=st.integers(0, 15),
    options=st.fixed_dictionaries(
        {}, optional={"window": st.integers(1, 9), "drawable": st.just(("a", "d")), "metric": st.just("norm")}
    ),
)
def test_a_restored_online_ranking_goes_on_exactly_as_the_first(seed: int, before: int, options: Any) -> None:
    rng = np.random.default_rng(seed)
    batches = [gradients(rng, TABLE, dict.fromkeys(TABLE.names, 0.1)) for _ in range(before + 6)]
    through = online(**options)
    for batch in batches[:before]:
        through.observe(batch)
    restored = OnlineRanking.from_json(json.loads(json.dumps(through.to_json())), TABLE)
    for batch in batches[before:]:
        through.observe(batch)
        restored.observe(batch)
        assert restored.settled == through.settled
    assert restored.to_json() == through.to_json()
    assert restored.ranking() == through.ranking()


def test_the_state_of_another_model_is_refused() -> None:
    data = online().to_json()
    with pytest.raises(RankingError, match=r"do not exist here: b, c, d"):
        OnlineRanking.from_json(data, table_of(layer("a")))
    with pytest.raises(RankingError, match="another order"):
        OnlineRanking.from_json(data, table_of(*reversed(TABLE.layers)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0"),
        ({"format": "trady-ranking"}, "no online ranking"),
        ({"sums": [1.0]}, "damaged"),
        ({"sums": [float("nan")] * 4}, "damaged"),
        ({"counts": "many"}, "damaged"),
        ({"history": [[1.0]]}, "damaged"),
        ({"window": None}, "damaged"),
        ({"layers": 3}, "damaged"),
        ({"share": 2}, "share 2"),
        ({"metric": "size"}, "metric is 'size'; possible are 'rgn'"),
        ({"drawable": ["z"]}, "drawable layers that the model lacks: z"),
    ],
)
def test_a_damaged_state_is_refused(change: Any, message: str) -> None:
    with pytest.raises(RankingError, match=message):
        OnlineRanking.from_json({**online().to_json(), **change}, TABLE)


def test_a_state_that_lacks_a_field_is_refused() -> None:
    data = online().to_json()
    del data["sums"]
    with pytest.raises(RankingError, match="lacks 'sums'"):
        OnlineRanking.from_json(data, TABLE)


@pytest.mark.parametrize("options", [{"window": 0}, {"min_observations": 0}, {"share": 0}, {"agreement": 2}])
def test_options_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(RankingError, match=next(iter(options))):
        online(**options)
