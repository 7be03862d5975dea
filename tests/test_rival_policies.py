"""The rules of other papers: which channels they take, in what order, and that they stay inside the budget."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import trady
from tests.models import Residual, normal, seeded
from tests.small_task import CLASSES, StopAfter, small_data, small_net
from tests.tuned import observed
from trady.channels.table import ChannelTable, Layer
from trady.errors import BudgetError, CheckpointError, PolicyError, StateError, TrainingError
from trady.policies import Draw, Evidence, Scheme, SparseUpdate, draw_selection, get_policy, policy_names
from trady.policies.orders import weighted_order
from trady.ranking.scores import channel_rgn, layer_rgn, top_layers
from trady.training.progress import Silent
from trady.training.run import finetune

ORACLES = ["dynamic-rgn", "static-rgn", "dynamic-norm", "static-norm"]
MEASURING = {**dict.fromkeys([*ORACLES, "medyate"], "gradients"), "fisher": "fisher"}


def layer(name: str, channels: int = 8, weight: int = 3, activation: int = 4, flops: int = 5) -> Layer:
    return Layer(name, f"{name}.weight", "conv2d", channels, weight, activation, flops, (weight, channels), (), ())


@st.composite
def draws(draw: Any, kind: str) -> Draw:
    sizes = draw(
        st.lists(
            st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
            min_size=1,
            max_size=5,
        )
    )
    table = ChannelTable(tuple(layer(f"l{i}", *size) for i, size in enumerate(sizes)))
    numbers = st.floats(0, 1e6) | st.sampled_from([0.0, 1e-300, 1e150])
    values = {each.name: draw(st.lists(numbers, min_size=each.channels, max_size=each.channels)) for each in table}
    return Draw(
        table=table,
        pool=table.names,
        costs={each.name: each.elements for each in table},
        capacity=draw(st.none() | st.integers(0, 300)),
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 2**32 - 1)),
        evidence=Evidence({kind: values}),
    )


# -- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURING)
@given(data=st.data())
def test_the_budget_holds_and_no_channel_is_left_out_that_fits(name: str, data: st.DataObject) -> None:
    draw = data.draw(draws(MEASURING[name]))
    selection = draw_selection(get_policy(name), draw)
    assert selection == draw_selection(get_policy(name), draw)
    if draw.capacity is None:
        assert name == "medyate" or selection.count == draw.table.channel_count
        return
    left = draw.capacity - draw.table.elements(selection)
    assert left >= 0
    if name != "medyate":  # it keeps to its pool
        for each in draw.table:
            assert len(selection.channels.get(each.name, ())) == each.channels or each.elements > left


@pytest.mark.parametrize("name", [*MEASURING, "sparse-update"])
def test_each_says_what_it_measures_and_when(name: str) -> None:
    policy: Any = get_policy(name)
    assert policy.needs.kinds == (MEASURING.get(name, "weights"),)
    assert policy.needs.each_epoch is name.startswith("dynamic")
    bare = Draw(ChannelTable((layer("a"),)), ("a",), {"a": 7}, 70, 0, 0)
    with pytest.raises(PolicyError, match=f"'{policy.needs.kinds[0]}' was not measured|needs a scheme"):
        policy.select(bare)


@pytest.mark.parametrize("name", [n for n in MEASURING if n != "medyate"])
@given(data=st.data(), epoch=st.integers(0, 100))
def test_what_is_chosen_by_score_does_not_depend_on_seed_and_epoch(name: str, data: st.DataObject, epoch: int) -> None:
    draw = data.draw(draws(MEASURING[name]))
    other = Draw(draw.table, draw.pool, draw.costs, draw.capacity, 5, epoch, 1, draw.evidence)
    assert draw_selection(get_policy(name), draw) == draw_selection(get_policy(name), other)


# -- oracles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
@given(data=st.data())
def test_oracles_take_the_highest_scores_first(name: str, data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 20))
    table = ChannelTable((layer("a", channels, 2, 3), layer("b", channels, 2, 3)))  # all channels cost the same
    # Whole numbers: two that differ in their last bit have the same square root, and are as good as each other.
    numbers = st.lists(st.integers(0, 1000).map(float), min_size=channels, max_size=channels)
    squared: dict[str, Any] = {each.name: data.draw(numbers) for each in table}
    taken = data.draw(st.integers(0, 2 * channels))
    draw = Draw(table, table.names, {"a": 5, "b": 5}, 5 * taken, 0, 0, 0, Evidence({"gradients": squared}))
    selection = draw_selection(get_policy(name), draw)
    chosen = [squared[n][c] for n, picked in selection.items() for c in picked]
    assert sorted(chosen, reverse=True) == sorted(squared["a"] + squared["b"], reverse=True)[:taken]


def test_rgn_weighs_a_gradient_by_its_cost_and_norm_does_not() -> None:
    table = ChannelTable((layer("dear", 1, 90, 10), layer("cheap", 1, 5, 5)))
    evidence = Evidence({"gradients": {"dear": np.array([4.0]), "cheap": np.array([1.0])}})
    draw = Draw(table, table.names, {"dear": 100, "cheap": 10}, 105, 0, 0, 0, evidence)
    assert list(draw_selection(get_policy("static-norm"), draw)) == ["dear"]
    assert list(draw_selection(get_policy("static-rgn"), draw)) == ["cheap"]


def test_the_oracle_of_a_real_model_holds_the_channels_of_the_highest_rgn() -> None:
    batches = [(normal(4, 3, 9, 9, seed=s), torch.arange(4)) for s in range(2)]
    tuner = trady.prepare(seeded(Residual), batches[0][0], budget="elements:1500", policy="dynamic-rgn")
    squared = observed(tuner, batches)["gradients"]
    table = tuner.plan.table
    scores = {(each.name, c): v for each in table for c, v in enumerate(channel_rgn(squared[each.name], each))}
    chosen = {(name, c) for name, channels in tuner.resample(0).items() for c in channels.tolist()}
    cut = min(scores[each] for each in chosen)
    left = 1500 - tuner.cost().elements
    assert all(table[name].elements > left or (name, c) in chosen for (name, c), v in scores.items() if v > cut)
    best = max(scores, key=lambda each: scores[each])
    assert best in chosen
    tuner.finish()


# -- fisher ------------------------------------------------------------------------------------------------------


def test_fisher_takes_layers_by_potential_over_cost_and_channels_by_information() -> None:
    table = ChannelTable((layer("a", 3, 4, 6, 8), layer("b", 3, 2, 8, 4), layer("c", 3, 4, 6, 8)))
    values: dict[str, Any] = {"a": [5.0, 0.0, 1.0], "b": [0.3, 2.0, 0.1], "c": [0.1, 0.1, 0.2]}
    # s_a = 6 / (1 · 1), s_b = 2.4 / (½ · ½) = 9.6, s_c = 0.4
    taken = []
    for count in range(1, 10):
        draw = Draw(table, table.names, dict.fromkeys("abc", 10), 10 * count, 0, 0, 0, Evidence({"fisher": values}))
        selection = draw_selection(get_policy("fisher"), draw)
        taken.append({(n, int(c)) for n, channels in selection.items() for c in channels})
    added = [next(iter(now - before)) for before, now in zip([set(), *taken], taken, strict=False)]
    assert added == [("b", 1), ("b", 0), ("b", 2), ("a", 0), ("a", 2), ("a", 1), ("c", 2), ("c", 0), ("c", 1)]


# -- medyate -----------------------------------------------------------------------------------------------------


def test_weighted_draws_follow_the_weights() -> None:
    weights = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    draws_made = 20_000
    first: Counter[int] = Counter()
    pairs: Counter[tuple[int, ...]] = Counter()
    for epoch in range(draws_made):
        order = weighted_order(weights, 7, epoch, 0).tolist()
        first[order[0]] += 1
        pairs[tuple(order[:2])] += 1
        assert order[-1] == 4
    for a in range(4):
        p = weights[a] / 10
        assert abs(first[a] - draws_made * p) < 4 * np.sqrt(draws_made * p * (1 - p))
        for b in set(range(4)) - {a}:
            q = p * weights[b] / (10 - weights[a])  # without replacement
            assert abs(pairs[a, b] - draws_made * q) < 4 * np.sqrt(draws_made * q * (1 - q))


@given(
    weights=st.lists(st.floats(0, 1e300) | st.just(1e-310), max_size=40),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_weighted_order_is_an_order_whose_scale_does_not_matter(weights: list[float], seed: int) -> None:
    order = weighted_order(np.array(weights), seed, 3, 1)
    assert sorted(order.tolist()) == list(range(len(weights)))
    assert (np.diff((np.array(weights)[order] == 0).astype(int)) >= 0).all()


def test_weighted_draws_are_the_same_on_every_machine() -> None:
    order = weighted_order(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0]), 1, 2, 3)
    assert order.tolist() == [2, 4, 3, 1, 0, 5, 6]


def test_medyate_draws_anew_in_each_epoch_from_the_layers_that_carry_the_gradient() -> None:
    table = ChannelTable((layer("a", 40), layer("b", 40), layer("still", 40)))
    rng = np.random.default_rng(0)
    squared = {"a": rng.uniform(1, 5, 40), "b": rng.uniform(1, 5, 40), "still": rng.uniform(0, 1e-4, 40)}
    assert set(top_layers({each.name: layer_rgn(squared[each.name], each) for each in table})) == {"a", "b"}
    evidence = Evidence({"gradients": squared})
    found = [
        draw_selection(
            get_policy("medyate"), Draw(table, table.names, dict.fromkeys(table.names, 7), 140, 0, epoch, 0, evidence)
        )
        for epoch in range(30)
    ]
    assert len({selection.digest for selection in found}) == 30
    assert {name for selection in found for name in selection} == {"a", "b"}
    assert all(selection.count == 20 for selection in found)


# -- sparse update -----------------------------------------------------------------------------------------------


def three_layers() -> ChannelTable:
    return ChannelTable((layer("a", 4), layer("b", 8, 1, 1), layer("c", 5, 10, 10)))


def test_a_scheme_takes_the_largest_norm_channels_of_its_layers() -> None:
    table = three_layers()
    scheme = Scheme((2, 1, 0), (0.4, 0.25, 0))
    assert scheme.counts(table) == {"b": 2, "c": 2}
    assert scheme.elements(table) == 2 * 2 + 2 * 20
    b, c = np.array([1.0, 9, 3, 4, 8, 6, 7, 5]), np.array([2.0, 1, 5, 4, 3])
    norms = Evidence({"weights": {"a": np.ones(4), "b": b, "c": c}})
    for epoch in (0, 5):
        draw = Draw(table, table.names, {"a": 7, "b": 2, "c": 20}, 44, epoch, epoch, 0, norms)
        assert draw_selection(SparseUpdate(scheme), draw).to_json() == {"b": [1, 4], "c": [2, 3]}
    dear = Draw(table, table.names, {"a": 7, "b": 2, "c": 20}, 43, 0, 0, 0, norms)
    with pytest.raises(BudgetError, match=r"needs 44 .* leaves 43 .*44 elements"):
        draw_selection(SparseUpdate(scheme), dear)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scheme((1,), ()), "has 0 ratios"),
        (lambda: Scheme((-1,), (1,)), "layer -1"),
        (lambda: Scheme((True,), (1,)), "layer True"),
        (lambda: Scheme((1, 1), (1, 1)), "twice"),
        (lambda: Scheme((1,), (1.5,)), r"ratio 1\.5"),
        (lambda: Scheme((1,), (float("nan"),)), "ratio nan"),
        (lambda: Scheme((3,), (1,)).counts(three_layers()), "trains layer 3, and this network has layers 0 to 2"),
        (lambda: Scheme((1,), (1,), 9).counts(three_layers()), "network of 9 layers, this one has 3"),
        (lambda: Scheme.from_json([]), "lacks layer_indices"),
        (lambda: Scheme.from_json({"layer_indices": 4, "channel_ratios": [1]}), "damaged"),
        (lambda: Scheme.from_json({"layer_indices": [4], "channel_ratios": [1], "version": 9}), "version 9"),
        (lambda: Scheme.load("nowhere.json"), "cannot read the scheme nowhere.json"),
    ],
)
def test_what_is_no_scheme_is_refused(make: Any, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        make()


def test_a_scheme_is_written_and_read(tmp_path: Path) -> None:
    scheme = Scheme((2, 5), (0.125, 1), 7)
    scheme.save(tmp_path / "scheme.json")
    assert Scheme.load(tmp_path / "scheme.json") == scheme
    assert Scheme.from_json({"layer_indices": [2, 5], "channel_ratios": [0.125, 1], "bias_layers": 3}).layers == (2, 5)


def test_without_a_scheme_it_says_how_to_get_one() -> None:
    with pytest.raises(PolicyError, match=r"--scheme FILE; trady search MODEL DATASET"):
        trady.plan(small_net(), torch.randn(2, 3, 12, 12), budget="elements:5000", policy="sparse-update")


@pytest.mark.parametrize("budget", ["elements:{elements}", "update:1 MiB", "peak:1 MiB"])
def test_a_scheme_trains_the_same_channels_in_every_epoch_and_after_a_restart(budget: str) -> None:
    x = normal(4, 3, 9, 9)
    scheme = Scheme((0, 3), (1, 0.5))
    table = trady.plan(seeded(Residual), x, budget="elements:9999", policy="head").table
    options: dict[str, Any] = {"budget": budget.format(elements=scheme.elements(table)), "policy": SparseUpdate(scheme)}
    plan = trady.plan(Residual().to("meta"), x.to("meta"), **options)
    assert plan.cost.elements == scheme.elements(table)
    model = seeded(Residual)
    tuner = trady.prepare(model, x, **options)
    assert {n: len(c) for n, c in tuner.selection.items()} == scheme.counts(table)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=5.0))
    first = tuner.resample(0)
    for epoch in range(3):
        assert tuner.resample(epoch) == first  # although the norms have changed
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    twin = trady.prepare(seeded(Residual), x, **options)
    twin.load_state_dict(tuner.state_dict())
    assert twin.resample(4) == first
    other = trady.prepare(seeded(Residual), x, **{**options, "policy": SparseUpdate(Scheme((0,), (1,)))})
    with pytest.raises(CheckpointError, match="policy options"):
        other.load_state_dict(tuner.state_dict())


# -- whole runs --------------------------------------------------------------------------------------------------


def run(out: Path | None, **options: Any) -> Any:
    settings: dict[str, Any] = {"budget": "elements:2500", "epochs": 3, "batch_size": 8, "lr": 0.05, **options}
    model: nn.Module = settings.pop("model", None) or small_net()
    data = (small_data(24, 0), small_data(12, 1))
    return finetune(model, *data, out=out, progress=settings.pop("progress", False), **settings)


def end(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("policy", ["dynamic-rgn", "medyate", "fisher", "velocity", "scheme"])
def test_a_killed_run_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path: Path, policy: str) -> None:
    settings = {
        "policy": SparseUpdate(Scheme((1,), (0.5,))) if policy == "scheme" else policy,
        "observed_batches": 2,
        "momentum": 0.9,
    }
    whole = run(tmp_path / "whole", **settings)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", progress=StopAfter(1), **settings)
    again = run(tmp_path / "broken", resume=True, **settings)
    assert end(tmp_path / "whole") == end(tmp_path / "broken")
    hashes = [[m.selection_hash for m in result.history] for result in (whole, again)]
    assert hashes[0] == hashes[1]
    assert all(m.channels > 0 for m in whole.history)
    observed = [m.observing_seconds > 0 for m in whole.history]
    assert observed == {"dynamic-rgn": [True] * 3, "velocity": [True] * 3, "scheme": [False] * 3}.get(
        policy, [True, False, False]
    )
    assert all(m.observing_seconds < m.seconds for m in whole.history)


def test_a_run_shows_that_it_observes_and_how_far_it_is() -> None:
    seen: list[tuple[int, int]] = []

    class Watch(Silent):
        def observing(self, epoch: int, epochs: int, passes: int) -> None:
            seen.append((epoch, passes))

    run(None, policy="dynamic-norm", observed_batches=2, epochs=2, progress=Watch())
    passes = [count for epoch, count in seen if epoch == 0]
    assert passes == list(range(1, len(passes) + 1))
    assert len(passes) % 2 == 0
    assert {epoch for epoch, _ in seen} == {0, 1}


def test_the_batches_that_are_observed_are_a_setting_of_policies_that_observe(tmp_path: Path) -> None:
    run(tmp_path / "a", policy="static-norm", observed_batches=1, epochs=1)
    with pytest.raises(CheckpointError, match="observed_batches was 1, is now 2"):
        run(tmp_path / "a", policy="static-norm", observed_batches=2, epochs=1, resume=True)
    run(tmp_path / "b", policy="dynamic-random", observed_batches=1, epochs=1)
    run(tmp_path / "b", policy="dynamic-random", observed_batches=2, epochs=1, resume=True)
    with pytest.raises(TrainingError, match="observed_batches is 0"):
        run(None, policy="static-norm", observed_batches=0)


def test_observing_leaves_the_order_of_training_as_it_is() -> None:
    """Full selections train alike whether they were measured or not: same data, same dropout."""
    losses = []
    for policy in ("dynamic-random", "dynamic-norm"):
        result = run(None, policy=policy, budget="elements:99999", epochs=2)
        losses.append([m.train_loss for m in result.history])
    assert losses[0] == losses[1]


def test_every_measuring_policy_trains_a_model() -> None:
    for name in policy_names():
        if name in MEASURING:
            result = run(None, policy=name, epochs=1, observed_batches=1)
            assert 0 <= result.accuracy <= 1
            assert result.history[0].channels > 0
    assert CLASSES == 3


def test_a_policy_of_ones_own_that_measures_is_one_class() -> None:
    class Loud:
        name = "loud"
        uses_ranking = False
        needs = trady.policies.Needs(("gradients", "weights"))

        def select(self, draw: Draw) -> trady.Selection:
            first = draw.table.layers[0]
            loudest = int(np.argmax(draw.measured("gradients")[first.name] * draw.measured("weights")[first.name]))
            return trady.Selection({first.name: np.array([loudest])})

    result = run(None, policy=Loud(), epochs=2)
    assert [m.channels for m in result.history] == [1, 1]
    assert isinstance(json.loads(json.dumps(result.to_json())), dict)
    with pytest.raises(StateError, match="gradients and weights"):
        trady.prepare(small_net(), torch.randn(2, 3, 12, 12), budget="elements:900", policy=Loud()).resample(0)
