from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trady.channels.selection import Selection
from trady.channels.table import ChannelTable, Layer
from trady.cli import options
from trady.errors import BudgetError, PolicyError
from trady.policies import (
    Draw,
    draw_selection,
    fill,
    fill_selection,
    get_policy,
    layers_in_order,
    policy_names,
    register_policy,
    registry,
)
from trady.policies.fill import _rounds
from trady.policies.orders import shuffled

RANDOM = ["trady", "trady+", "dynamic-random", "static-random", "static-topk-random"]


def layer(name: str, channels: int = 8, weight: int = 3, activation: int = 4) -> Layer:
    return Layer(name, f"{name}.weight", "linear", channels, weight, activation, weight, (weight, channels), (), ())


def draw_of(
    layers: Any, *, pool: Any = None, capacity: int | None = None, seed: int = 0, epoch: int = 0, redraw: int = 0
) -> Any:
    table = ChannelTable(tuple(layers))
    return Draw(
        table=table,
        pool=table.names if pool is None else tuple(pool),
        costs={each.name: each.elements for each in layers},
        capacity=capacity,
        seed=seed,
        epoch=epoch,
        redraw=redraw,
    )


@st.composite
def fillings(draw: Any) -> Any:
    costs = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    layers = draw(st.lists(st.integers(0, len(costs) - 1), max_size=60))
    capacity = draw(st.none() | st.integers(-2, 400))
    return np.array(layers, dtype=np.int64), np.array(costs, dtype=np.int64), capacity


@st.composite
def draws(draw: Any) -> Any:
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
    layers = [layer(f"l{i}", *size) for i, size in enumerate(sizes)]
    pool = draw(st.lists(st.sampled_from([each.name for each in layers]), unique=True))
    return draw_of(
        layers,
        pool=pool,
        capacity=draw(st.none() | st.integers(0, 300)),
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 2**32 - 1)),
        redraw=draw(st.integers(0, 2**32 - 1)),
    )


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))


class First:
    """A user's own policy: the first channel of the first layer."""

    name = "first"
    uses_ranking = False

    def select(self, draw: Any) -> Any:
        return Selection({draw.table.names[0]: np.array([0])})


# -- fill --------------------------------------------------------------------------------------


@given(filling=fillings())
def test_fill_does_what_the_plain_loop_does(filling: Any) -> None:
    layers, costs, capacity = filling
    expected, left = [], capacity
    for each in layers:
        fits = left is None or costs[each] <= left
        expected.append(bool(fits))
        if fits and left is not None:
            left -= int(costs[each])
    assert fill(layers, costs, capacity).tolist() == expected


@given(filling=fillings().filter(lambda filling: filling[2] is not None and filling[2] >= 0))
def test_fill_never_exceeds_the_capacity_and_leaves_nothing_out_that_fits(filling: Any) -> None:
    layers, costs, capacity = filling
    taken = fill(layers, costs, capacity)
    left = capacity - int(costs[layers[taken]].sum())
    assert left >= 0
    assert (costs[layers[~taken]] > left).all()


def test_no_capacity_is_no_limit() -> None:
    assert fill(np.array([0, 1, 0]), np.array([5, 2**62]), None).all()


def test_negative_costs_are_refused() -> None:
    with pytest.raises(PolicyError, match="costs -1"):
        fill(np.array([0]), np.array([-1]), 5)


def test_costs_near_the_largest_integer_do_not_wrap_around() -> None:
    huge = 2**62
    taken = fill(np.zeros(5, dtype=np.int64), np.array([huge]), 2 * huge - 1)
    assert taken.tolist() == [True, False, False, False, False]
    taken = fill(np.array([0, 0, 0, 1]), np.array([huge, 7]), 2**70)
    assert taken.tolist() == [True, False, False, True], "capacities are cut at the largest integer"


def test_a_million_channels_take_few_rounds() -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(1_000, 100_000, size=200)
    cost = costs[np.repeat(np.arange(200), 5_000)[shuffled(1_000_000, 0, 0, 0)]]
    for capacity in (10**5, 10**7, 10**9, 10**10):
        assert len(list(_rounds(cost, capacity))) <= 8


def test_fill_takes_at_most_one_round_for_each_distinct_cost() -> None:
    costs = np.arange(200, 0, -1)
    assert len(list(_rounds(np.repeat(costs, 50), 10_123))) <= 201


def test_a_selection_of_a_million_channels_is_made_whole() -> None:
    layers = [layer(f"l{i}", channels=5_000, weight=1 + i, activation=7) for i in range(200)]
    draw = draw_of(layers, capacity=20_000_000)
    selection = draw_selection(get_policy("trady"), draw)
    left = draw.capacity - draw.table.elements(selection)
    assert 0 <= left < 8
    assert selection.count > 100_000


def test_channels_are_taken_in_the_order_given() -> None:
    draw = draw_of([layer("a", 3, 1, 1), layer("b", 2, 2, 1)], capacity=7)
    selection = fill_selection(draw, draw.table.layers, np.array([4, 2, 3, 0, 1]))
    assert selection.to_json() == {"a": [0, 2], "b": [1]}


def test_an_order_may_leave_channels_out() -> None:
    draw = draw_of([layer("a", 3), layer("b", 2)])
    assert fill_selection(draw, draw.table.layers, np.array([1])).to_json() == {"a": [1]}
    assert fill_selection(draw, (), np.array([], dtype=np.int64)) == Selection()


def test_layers_come_in_order_of_execution() -> None:
    draw = draw_of([layer("a"), layer("b"), layer("c")])
    assert [each.name for each in layers_in_order(draw, ("c", "a"))] == ["a", "c"]


def test_a_layer_without_a_cost_is_named() -> None:
    draw = draw_of([layer("a"), layer("b")])
    del draw.costs["b"]
    with pytest.raises(PolicyError, match="no cost for b"):
        draw_selection(get_policy("trady"), draw)


# -- the random policies -----------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM)
@given(draw=draws())
def test_random_policies_fill_the_capacity_with_the_layers_they_may_use(name: str, draw: Any) -> None:
    selection = draw_selection(get_policy(name), draw)
    allowed = draw.pool if get_policy(name).uses_ranking else draw.table.names
    assert set(selection) <= set(allowed)
    if draw.capacity is None:
        assert selection.count == sum(draw.table[each].channels for each in allowed)
        return
    left = draw.capacity - draw.table.elements(selection)
    assert left >= 0
    for each in allowed:
        full = each in selection and len(selection[each]) == draw.table[each].channels
        assert full or draw.costs[each] > left


@pytest.mark.parametrize("name", RANDOM)
@given(draw=draws(), data=st.data())
def test_same_draw_same_selection_whatever_the_order_of_the_pool(name: str, draw: Any, data: Any) -> None:
    pool = data.draw(st.permutations(draw.pool))
    again = draw_of(
        draw.table.layers,
        pool=pool,
        capacity=draw.capacity,
        seed=draw.seed,
        epoch=draw.epoch,
        redraw=draw.redraw,
    )
    policy = get_policy(name)
    assert draw_selection(policy, draw) == draw_selection(policy, again)


LAYERS = [layer("a", 64), layer("b", 64), layer("c", 64)]
GOLDEN = {"a": [20, 47, 48, 51, 52], "c": [7, 28, 29, 45, 55]}


def test_selections_are_the_same_in_every_version_of_numpy() -> None:
    draw = draw_of(LAYERS, pool=("a", "c"), capacity=70, seed=1, epoch=2, redraw=3)
    assert draw_selection(get_policy("trady"), draw).to_json() == GOLDEN


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 2**32}, {"epoch": 1}, {"redraw": 1}])
@pytest.mark.parametrize("name", RANDOM)
def test_dynamic_policies_draw_anew_for_each_epoch_and_redraw_and_static_ones_do_not(name: str, change: Any) -> None:
    policy = get_policy(name)
    first = draw_selection(policy, draw_of(LAYERS, capacity=300))
    second = draw_selection(policy, draw_of(LAYERS, capacity=300, **change))
    stays = name.startswith("static") and "seed" not in change
    assert (first == second) is stays


def test_no_two_draws_share_their_random_numbers() -> None:
    draws = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (1, 1, 0), (2**32 + 1, 0, 0), (0, 0, 0)]
    assert len({tuple(shuffled(50, *each)) for each in draws}) == len(draws)


def test_trady_plus_draws_a_channel_as_often_as_it_is_cheap_and_trains_more_of_them() -> None:
    layers = [layer("dear", 100, 20, 20), layer("cheap", 100, 5, 5)]
    counts: Counter[str] = Counter()
    for epoch in range(400):
        one = get_policy("trady+").select(draw_of(layers, capacity=40, epoch=epoch))
        counts["dear"] += "dear" in one
        assert sum(len(channels) for channels in one.values()) in (1, 4)
    assert 400 * 0.2 * 0.65 < counts["dear"] < 400 * 0.2 * 1.35
    trained = {
        name: sum(get_policy(name).select(draw_of(layers, capacity=400, epoch=epoch)).count for epoch in range(50))
        for name in ("trady", "trady+")
    }
    assert trained["trady+"] > 1.2 * trained["trady"]


@pytest.mark.parametrize(("static", "dynamic"), [("static-random", "dynamic-random"), ("static-topk-random", "trady")])
def test_a_static_policy_holds_the_channels_that_its_dynamic_twin_starts_with(static: str, dynamic: str) -> None:
    later = draw_of(LAYERS, pool=("a", "b"), capacity=300, epoch=7, redraw=2)
    start = draw_of(LAYERS, pool=("a", "b"), capacity=300)
    assert draw_selection(get_policy(static), later) == draw_selection(get_policy(dynamic), start)


def test_trady_draws_every_channel_of_the_pool_equally_often() -> None:
    layers = [layer("a", 5), layer("b", 20), layer("out", 10), layer("c", 35)]
    epochs, taken_each = 3_000, 12
    drawn: Counter[Any] = Counter()
    for epoch in range(epochs):
        draw = draw_of(layers, pool=("c", "a", "b"), capacity=taken_each * 7, seed=5, epoch=epoch)
        selection = draw_selection(get_policy("trady"), draw)
        assert selection.count == taken_each
        drawn.update((name, c) for name, channels in selection.items() for c in channels.tolist())
    counts = np.array([drawn[name, c] for name, n in (("a", 5), ("b", 20), ("c", 35)) for c in range(n)])
    assert counts.sum() == epochs * taken_each
    p = taken_each / 60
    # Pearson's statistic for draws without replacement has n - 1 = 59 degrees of freedom.
    statistic = ((counts - epochs * p) ** 2).sum() / (epochs * p * (1 - p)) * 59 / 60
    assert 59 - 4 * np.sqrt(2 * 59) < statistic < 59 + 4 * np.sqrt(2 * 59)


def test_pairs_of_channels_are_drawn_independently_of_their_neighbourhood() -> None:
    together = np.zeros((12, 12))
    for epoch in range(4_000):
        mask = np.zeros(12)
        mask[shuffled(12, 9, epoch, 0)[:4]] = 1
        together += np.outer(mask, mask)
    pairs = together[np.triu_indices(12, 1)]
    expected = 4_000 * 4 * 3 / (12 * 11)
    assert np.abs(pairs - expected).max() < 4.5 * np.sqrt(expected)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"epoch": -1}, {"redraw": -1}, {"epoch": 2**32}])
def test_seeds_and_epochs_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match="they start at 0"):
        draw_selection(get_policy("trady"), draw_of(LAYERS, **bad))


def test_a_pool_of_another_model_is_refused() -> None:
    with pytest.raises(PolicyError, match="lacks: zzz"):
        draw_selection(get_policy("trady"), draw_of(LAYERS, pool=("a", "zzz")))


# -- the extremes ------------------------------------------------------------------------------


@given(draw=draws())
def test_head_selects_nothing(draw: Any) -> None:
    assert draw_selection(get_policy("head"), draw) == Selection()


def test_full_selects_everything_that_there_is() -> None:
    draw = draw_of(LAYERS)
    assert draw_selection(get_policy("full"), draw).count == draw.table.channel_count
    exact = draw_of(LAYERS, capacity=192 * 7)
    assert draw_selection(get_policy("full"), exact).count == 192


def test_full_says_what_it_needs_when_it_does_not_fit() -> None:
    with pytest.raises(BudgetError, match=r"needs 1344 for all 192 channels.*leaves 1343.*add at least 1,"):
        draw_selection(get_policy("full"), draw_of(LAYERS, capacity=192 * 7 - 1))


# -- registry ----------------------------------------------------------------------------------


def test_the_shipped_policies_are_registered_on_import() -> None:
    assert set(policy_names()) >= {*RANDOM, "head", "full"}
    assert list(policy_names()) == sorted(policy_names())
    assert {name for name in RANDOM if get_policy(name).uses_ranking} == {"trady", "trady+", "static-topk-random"}


def test_the_help_of_the_command_line_and_the_docs_name_every_policy() -> None:
    shipped = [name for name in policy_names() if type(get_policy(name)).__module__.startswith("trady.")]
    assert list(options.POLICIES) == shipped
    table = Path(__file__).parents[1].joinpath("docs", "policies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z+-]+)` \|", table, re.MULTILINE)) == set(shipped)


@pytest.mark.usefixtures("scratch_registry")
def test_a_policy_is_registered_as_class_as_instance_or_with_options() -> None:
    assert register_policy(First) is First
    assert isinstance(get_policy("first"), First)
    instance = First()
    assert register_policy(instance, replace=True) is instance
    assert get_policy("first") is instance
    assert register_policy(replace=True)(First) is First
    assert get_policy("first") is not instance


@pytest.mark.usefixtures("scratch_registry")
def test_a_taken_name_is_refused_unless_replaced() -> None:
    register_policy(First)
    with pytest.raises(PolicyError, match=r"'first' exists already.*replace=True"):
        register_policy(First())


def test_a_policy_instance_passes_through() -> None:
    policy = First()
    assert get_policy(policy) is policy


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("trdy", "trady"),
        ("TraDy", "trady"),
        ("dynamic_random", "dynamic-random"),
        ("static topk", "static-topk-random"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_and_all_of_them(name: str, near: str) -> None:
    with pytest.raises(PolicyError) as caught:
        get_policy(name)
    assert f"did you mean {near!r}" in str(caught.value)
    assert all(known in str(caught.value) for known in policy_names())


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(PolicyError, match=r"no policy 'qqq'; there are .*trady"):
        get_policy("qqq")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (object(), "is no policy"),
        (type("Nameless", (First,), {"name": ""}), "is named ''"),
        (type("Needy", (First,), {"__init__": lambda self, x: None}), "register an instance"),
        (type("Idle", (First,), {"select": None}), "is no policy"),
    ],
)
@pytest.mark.usefixtures("scratch_registry")
def test_what_is_no_policy_is_not_registered(given: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        register_policy(given)


def test_a_class_in_place_of_an_instance_is_refused() -> None:
    with pytest.raises(PolicyError, match="First is a class"):
        get_policy(cast(Any, First))
    with pytest.raises(PolicyError, match="is no policy"):
        get_policy(cast(Any, object()))


# -- users' own policies are checked -------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"a": [0]}, "returned dict"),
        (Selection({"zzz": np.array([0])}), "layer 'zzz', which the model lacks"),
        (Selection({"a": np.array([0, 64])}), "channel 64 of layer 'a', which has channels 0 to 63"),
        (Selection({"b": np.array([-1, 5])}), "channel -1 of layer 'b'"),
        (
            Selection({"a": np.array([1]), "b": np.array([1, 2])}),
            "cost 21, and 20 is left; layer 'b' takes most, 14",
        ),
    ],
)
def test_what_a_policy_may_not_draw_is_refused_with_policy_and_layer(answer: Any, message: str) -> None:
    class Wrong(First):
        name = "wrong"

        def select(self, draw: Any) -> Any:
            return answer

    with pytest.raises(PolicyError, match=message) as caught:
        draw_selection(Wrong(), draw_of(LAYERS, capacity=20))
    assert "policy 'wrong'" in str(caught.value)


def test_a_policy_of_ones_own_draws_what_it_says() -> None:
    assert draw_selection(First(), draw_of(LAYERS, capacity=7)).to_json() == {"a": [0]}
