import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trady.channels.table import ChannelTable, Layer
from trady.errors import RankingError
from trady.ranking.online import OnlineRanking
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.ranking.scores import channel_rgn, channel_scores, layer_rgn, layer_score, spearman, top_layers
from trady.ranking.structural import structural_ranking

scores_of_layers = st.dictionaries(st.text(max_size=5), st.floats(0, allow_infinity=False), min_size=1, max_size=12)


def layer(name, channels=8, weight=3, activation=4, kind="linear", groups=1, tokens=1):
    return Layer(
        name,
        f"{name}.weight",
        kind,
        channels,
        weight,
        activation,
        weight,
        (weight, channels),
        ((tokens, channels),),
        (),
        groups,
    )


def table_of(*layers):
    return ChannelTable(tuple(layers))


TABLE = table_of(layer("a", 3, 2, 5), layer("b", 40, 10, 6), layer("c", 12, 1, 1), layer("d", 100, 30, 20))


def online(table=TABLE, **options):
    return OnlineRanking(table, **options)


def everywhere(value, table=TABLE):
    return {each.name: np.full(each.channels, value) for each in table}


# -- scores --------------------------------------------------------------------------------------


def test_layer_rgn_is_the_squared_norm_over_the_cost_of_all_channels():
    squared = np.array([1.0, 4.0, 9.0])
    assert layer_rgn(squared, TABLE["a"]) == pytest.approx(14 / (3 * 7))
    assert layer_score(squared, TABLE["a"], "norm") == 14


def test_channel_rgn_is_the_norm_over_the_cost_of_the_channel():
    squared = np.array([1.0, 4.0, 9.0])
    np.testing.assert_allclose(channel_rgn(squared, TABLE["a"]), np.array([1, 2, 3]) / 7)
    np.testing.assert_allclose(channel_scores(squared, TABLE["a"], "norm"), [1, 2, 3])


def test_there_is_one_norm_for_each_channel():
    with pytest.raises(RankingError, match=r"shape \(2,\) for layer 'a'; it has 3 channels"):
        layer_rgn([1.0, 2.0], TABLE["a"])


# -- top-K ---------------------------------------------------------------------------------------


@given(scores=scores_of_layers, share=st.floats(0, 1, exclude_min=True))
def test_top_is_the_shortest_run_of_best_layers_that_reaches_the_share(scores, share):
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


def test_the_share_is_what_the_user_typed_not_its_binary_neighbour():
    equal = {str(i): 0.1 for i in range(100)}
    for hundredths in range(1, 101):
        assert len(top_layers(equal, hundredths / 100)) == hundredths


def test_layers_come_by_falling_score_and_equal_ones_in_order_of_execution():
    ranking = LayerRanking({"a": 1.0, "b": 5.0, "c": 1.0, "d": 0.0})
    assert ranking.order == ("b", "a", "c", "d")
    assert ranking.top(0.72) == ("b", "a")
    assert ranking.top(1) == ("b", "a", "c")


def test_without_any_gradient_all_layers_are_top():
    assert LayerRanking({"a": 0.0, "b": 0.0}).top() == ("a", "b")


def test_scores_whose_sum_overflows_still_rank():
    assert LayerRanking({"a": 1.7e308, "b": 1.7e308, "c": 1.0}).top() == ("a", "b")


@pytest.mark.parametrize("share", [0, -0.1, 1.0001, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(RankingError, match="above 0 and at most 1"):
        LayerRanking({"a": 1.0}).top(share)


# -- rank correlation ------------------------------------------------------------------------------


@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30).filter(
        lambda pairs: len({a for a, _ in pairs}) > 1 and len({b for _, b in pairs}) > 1
    )
)
def test_spearman_is_scipys_ties_included(pairs):
    left, right = zip(*pairs, strict=True)
    assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_spearman_of_a_single_rank_is_defined():
    assert spearman([1.0, 1.0], [2.0, 2.0]) == 1
    assert spearman([1.0, 1.0], [2.0, 3.0]) == 0
    assert spearman([5.0], [7.0]) == 1


def test_rankings_compare_layer_by_layer_whatever_their_order():
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
def test_a_ranking_of_impossible_values_is_refused(values, message):
    with pytest.raises(RankingError, match=message):
        LayerRanking(**values)


@given(
    scores=scores_of_layers,
    metric=st.sampled_from(["rgn", "norm"]),
    source=st.sampled_from(["measured", "online", "prior", "given"]),
    batches=st.integers(0, 10**6),
    data=st.data(),
)
def test_a_ranking_survives_its_file(tmp_path_factory, scores, metric, source, batches, data):
    channels = data.draw(
        st.dictionaries(st.sampled_from(sorted(scores)), st.lists(st.floats(0, allow_infinity=False)).map(tuple))
    )
    ranking = LayerRanking(scores, metric, source, "0123", channels, batches)
    path = tmp_path_factory.mktemp("ranking") / "ranking.json"
    ranking.save(path)
    again = LayerRanking.load(path)
    assert again == ranking
    assert list(again.scores) == list(ranking.scores), "order of execution is kept"


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "ranking.json"
    LayerRanking({"a": 1.0}).save(path)
    LayerRanking({"b": 2.0}).save(str(path))
    assert LayerRanking.load(str(path)).scores == {"b": 2.0}
    assert [each.name for each in tmp_path.iterdir()] == ["ranking.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ranking.json"
    LayerRanking({"a": 1.0}).save(path)

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(RankingError, match=r"cannot write the ranking to .*No space left"):
        LayerRanking({"b": 2.0}).save(path)
    assert LayerRanking.load(path).scores == {"a": 1.0}
    assert [each.name for each in tmp_path.iterdir()] == ["ranking.json"]


def test_a_folder_that_is_not_there_is_an_error_of_the_family(tmp_path):
    with pytest.raises(RankingError, match="cannot write"):
        LayerRanking({"a": 1.0}).save(tmp_path / "nowhere" / "ranking.json")
    with pytest.raises(RankingError, match="cannot read"):
        LayerRanking.load(tmp_path / "nowhere.json")


def test_every_truncation_of_a_file_is_refused(tmp_path):
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
        ({"version": 2}, "version 2, this trady reads version 1: .*trady.rank"),
        ({"format": "other"}, "no layer ranking"),
        ({"scores": {"a": float("nan")}}, "score of layer 'a' is nan"),
        ({"scores": {"a": float("inf")}}, "score of layer 'a' is inf"),
        ({"scores": {"a": -1}}, "not negative"),
        ({"scores": 5}, "is damaged"),
        ({"scores": [1.0]}, "is damaged"),
        ({"channels": [1.0]}, "is damaged"),
        ({"channels": {"a": 5}}, "is damaged"),
        ({"metric": []}, "metric"),
        ({"batches": 1.5}, "batches"),
    ],
)
def test_a_file_of_another_version_or_with_impossible_values_is_refused(tmp_path, change, message):
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({**LayerRanking({"a": 1.0}).to_json(), **change}))
    with pytest.raises(RankingError, match=message):
        LayerRanking.load(path)


@pytest.mark.parametrize("field", ["format", "version", "metric", "source", "structure", "batches", "scores"])
def test_a_file_that_lacks_a_field_is_refused(tmp_path, field):
    data = LayerRanking({"a": 1.0}).to_json()
    del data[field]
    with pytest.raises(RankingError, match=field):
        LayerRanking.from_json(data)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"\x00"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "ranking.json"
    path.write_bytes(content)
    with pytest.raises(RankingError, match=r"ranking\.json"):
        LayerRanking.load(path)


def test_a_ranking_of_another_model_names_the_layers_that_do_not_fit():
    with pytest.raises(RankingError, match=r"names layers that do not exist here: z and misses layers: c, d"):
        LayerRanking({"a": 1.0, "b": 1.0, "z": 1.0}).check(TABLE)
    with pytest.raises(RankingError, match=r"2 channels of layer 'a', the model 3"):
        LayerRanking(dict.fromkeys(TABLE.names, 1.0), channels={"a": (1.0, 2.0)}).check(TABLE)
    LayerRanking(dict.fromkeys(TABLE.names, 1.0), channels={"a": (1.0, 2.0, 3.0)}).check(TABLE)


# -- structure -------------------------------------------------------------------------------------


def test_the_structure_is_in_kinds_and_shapes_not_in_names_or_inputs():
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


def test_a_prior_is_adopted_under_the_names_of_the_model():
    there = table_of(layer("x"), layer("y", 5))
    here = table_of(layer("y"), layer("a", 5))
    prior = LayerRanking({"x": 1.0, "y": 2.0}, source="prior", structure=structure_digest(there))
    adopted = prior.adopted(here)
    assert dict(adopted.scores) == {"y": 1.0, "a": 2.0}
    assert adopted.source == "prior"
    with pytest.raises(RankingError, match="of structure"):
        prior.adopted(table_of(layer("x"), layer("y", 6)))


# -- online ranking --------------------------------------------------------------------------------


def gradients(rng, table, means):
    """Heavy-tailed squared norms of every channel; the layer's expectation is ``means``."""
    return {each.name: means[each.name] * rng.lognormal(-0.5, 1, each.channels) for each in table}


def test_online_estimates_are_unbiased_however_often_a_layer_is_drawn():
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
    truth = np.array([means[each.name] / each.elements for each in TABLE])
    error = np.std(estimates, axis=0) / np.sqrt(300)
    assert (np.abs(np.mean(estimates, axis=0) - truth) < 4 * error).all()
    assert (error < 0.1 * truth).all(), "the test is sharp enough to see a bias of half"


def test_all_channels_observed_is_the_layer_rgn():
    rng = np.random.default_rng(1)
    full = gradients(rng, TABLE, dict.fromkeys(TABLE.names, 1.0))
    rgn, norm = online(), online(metric="norm")
    rgn.observe(full)
    norm.observe(full)
    for each in TABLE:
        assert rgn.ranking().scores[each.name] == pytest.approx(layer_rgn(full[each.name], each))
        assert norm.ranking().scores[each.name] == pytest.approx(full[each.name].sum())
    assert norm.ranking().metric == "norm"


def test_an_online_ranking_says_what_it_is():
    state = online()
    state.observe(everywhere(1.0))
    state.observe({})
    ranking = state.ranking()
    ranking.check(TABLE)
    assert (ranking.source, ranking.batches, ranking.structure) == ("online", 2, structure_digest(TABLE))
    assert tuple(ranking.scores) == TABLE.names


def test_layers_never_observed_have_a_guess_from_shapes_to_the_scale_of_the_others():
    state = online(metric="norm")
    state.observe({"a": [1.0], "b": [1.0]})
    scores = state.ranking().scores
    assert (scores["a"], scores["b"]) == (3, 40)
    guess = structural_ranking(TABLE).scores
    norm = {layer.name: guess[layer.name] * layer.channels * layer.elements for layer in TABLE}
    scale = (scores["a"] + scores["b"]) / (norm["a"] + norm["b"])
    assert (scores["c"], scores["d"]) == pytest.approx((scale * norm["c"], scale * norm["d"]))
    assert set(online().ranking().scores.values()) == {0.0}


def test_norms_that_are_not_finite_are_left_out_and_counted():
    state = online()
    state.observe({"a": [np.nan, 2.0, np.inf], "b": [np.inf]})
    assert state.ignored == 3
    assert state.observations == {"a": 1, "b": 0, "c": 0, "d": 0}
    assert state.ranking().scores["a"] == 2 / 7
    state.observe({"a": [1.7e308]})
    state.observe({"a": [1.7e308]})
    assert state.ignored == 4
    assert np.isfinite(state.ranking().scores["a"])


def test_a_batch_of_zeros_counts():
    state = online()
    state.observe({"a": [2.0]})
    state.observe({"a": [0.0]})
    assert state.ranking().scores["a"] == 1 / 7


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"z": [1.0]}, "layer 'z', which the model lacks"),
        ({"a": [1.0] * 4}, r"shape \(4,\) in layer 'a'.*at most 3"),
        ({"a": [[1.0]]}, "shape"),
        ({"a": [-1.0]}, "negative squared norm in layer 'a'"),
    ],
)
def test_an_impossible_observation_is_refused_and_leaves_no_trace(norms, message):
    state = online()
    before = state.to_json()
    with pytest.raises(RankingError, match=message):
        state.observe({"b": [1.0], **norms})
    assert state.to_json() == before


def test_a_steady_ranking_settles_after_the_window():
    state = online(window=8, min_observations=4)
    settled = []
    for _ in range(12):
        state.observe({"a": [1.0], "b": [2.0], "c": [3.0], "d": [4.0]})
        settled.append(state.settled)
    assert settled == [False] * 8 + [True] * 4


def test_a_ranking_waits_for_the_layer_observed_least():
    state = online(window=2, min_observations=3)
    steady = {"a": [1.0], "b": [2.0], "c": [3.0]}
    for _ in range(10):
        state.observe(steady)
    for expected in (False, False, False, True):
        assert state.settled is expected
        state.observe({**steady, "d": [4.0]})
    assert state.settled


def test_layers_that_cannot_be_drawn_are_not_waited_for():
    state = online(drawable=("a", "b", "c"), window=2)
    for _ in range(5):
        state.observe({"a": [1.0], "b": [2.0], "c": [3.0]})
    assert state.settled


def test_a_ranking_that_still_moves_does_not_settle():
    state = online(metric="norm", window=4, min_observations=1)
    for _ in range(5):
        state.observe({"a": [100.0], "b": [2.0], "c": [3.0], "d": [1.0]})
    assert state.settled
    state.observe({"a": [0.0], "b": [200.0], "c": [3.0], "d": [1.0]})
    assert not state.settled, "the order changed"


def test_the_same_order_with_another_pool_does_not_settle():
    table = table_of(layer("a", 1), layer("b", 1))
    state = online(table, window=1, min_observations=1)
    state.observe({"a": [100.0], "b": [2.0]})
    state.observe({"a": [100.0], "b": [90.0]})
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
def test_a_restored_online_ranking_goes_on_exactly_as_the_first(seed, before, options):
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


def test_the_state_of_another_model_is_refused():
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
        ({"metric": "size"}, "metric 'size'"),
        ({"drawable": ["z"]}, "drawable layers that the model lacks: z"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    with pytest.raises(RankingError, match=message):
        OnlineRanking.from_json({**online().to_json(), **change}, TABLE)


def test_a_state_that_lacks_a_field_is_refused():
    data = online().to_json()
    del data["sums"]
    with pytest.raises(RankingError, match="lacks 'sums'"):
        OnlineRanking.from_json(data, TABLE)


@pytest.mark.parametrize("options", [{"window": 0}, {"min_observations": 0}, {"share": 0}, {"agreement": 2}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(RankingError, match=next(iter(options))):
        online(**options)
