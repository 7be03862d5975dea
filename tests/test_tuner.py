"""The tuner: what trains, what stays, what is drawn, and what comes after the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trady
from tests.models import (
    Functional,
    Grouped,
    Residual,
    channels_of,
    freeze_norms,
    gradient_of,
    normal,
    relative_error,
    seeded,
    snapshot,
)
from tests.tuned import data, prepared, train
from trady.errors import BudgetError, ModelError, PolicyError, RankingError, StateError

# -- the contract ------------------------------------------------------------------------------------------------


def test_the_loop_of_the_readme_learns() -> None:
    model = seeded(Residual)
    tuner = trady.prepare(model, data()[0][0], budget="elements:3000")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    first = sum(float(F.cross_entropy(model(x), y).detach()) for x, y in data())
    for epoch in range(6):
        tuner.resample(epoch)
        for x, y in data():
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert tuner.finish() is model
    with torch.no_grad():
        assert sum(float(F.cross_entropy(model.eval()(x), y)) for x, y in data()) < 0.85 * first


@pytest.mark.parametrize("build", [Residual, Grouped, Functional], ids=lambda b: b.__name__)
def test_only_selected_channels_and_the_head_change_bit_for_bit(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    x = normal(4, 3, 17, 17)
    before = snapshot(model)
    tuner = trady.prepare(model, x, budget="elements:900", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    selected: dict[str, set[int]] = {}
    for epoch in range(3):
        for name, channels in tuner.resample(epoch).items():
            selected.setdefault(name, set()).update(channels.tolist())
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    table, head = tuner.plan.table, {n for n, _ in tuner.named_parameters()}
    tuner.finish()
    after = snapshot(model)
    by_parameter = {layer.parameter: layer for layer in table}
    changed = 0
    for name, tensor in after.items():
        if name in head:
            assert not torch.equal(tensor, before[name])
        elif name in by_parameter and by_parameter[name].name in selected:
            layer = by_parameter[name]
            rest = np.array(sorted(set(range(layer.channels)) - selected[layer.name]), dtype=np.int64)
            if len(rest):
                assert torch.equal(channels_of(tensor, layer, rest), channels_of(before[name], layer, rest))
            changed += not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name]), name
    assert changed > 0


def test_finish_gives_the_plain_model_back() -> None:
    model = seeded(Residual)
    model.stem[0].weight.requires_grad_(False)
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    model.train()

    def shape() -> list[Any]:
        return [
            [type(m) for m in model.modules()],
            [[*m._forward_hooks, *m._forward_pre_hooks, *m._forward_hooks_always_called] for m in model.modules()],
            list(model.state_dict()),
            [(n, p.requires_grad, id(p), type(p)) for n, p in model.named_parameters()],
            [sorted(vars(m)) for m in model.modules()],
            str(model),
        ]  # fmt: skip

    before = shape()
    tuner = prepared(model)
    train(tuner, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01)))
    tuner.finish()
    assert shape() == before
    handle.remove()
    twin = copy.deepcopy(model)
    freeze_norms(twin)
    freeze_norms(model)
    x = data()[0][0]
    assert torch.equal(model(x), twin(x))


def test_named_parameters_are_compact_and_stay_the_same_objects() -> None:
    tuner = prepared()
    before = dict(tuner.named_parameters())
    assert list(before)[-2:] == ["head.weight", "head.bias"]
    assert all(name.endswith(".weight.channels") for name in list(before)[:-2])
    for epoch in range(3):
        tuner.resample(epoch)
        now = dict(tuner.named_parameters())
        assert all(now[name] is parameter for name, parameter in before.items())
        for layer in tuner.plan.table:
            rows = len(tuner.selection.channels.get(layer.name, ()))
            assert now[f"{layer.parameter}.channels"].shape == (rows, layer.weight_shape[0], *layer.weight_shape[2:])
    tuner.finish()


def test_the_weights_hold_the_truth_after_each_step() -> None:
    tuner = prepared()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    train(tuner, optimizer, range(1), 1)
    for layer in tuner.plan.table:
        if layer.name in tuner.selection:
            compact = dict(tuner.named_parameters())[f"{layer.parameter}.channels"]
            weight = tuner.model.get_parameter(layer.parameter)
            assert torch.equal(channels_of(weight.detach(), layer, tuner.selection[layer.name]), compact)
    tuner.finish()


def test_a_step_equals_the_dense_step_on_the_selected_channels() -> None:
    """An SGD step of trady is the dense model's step with everything else masked out."""
    model = seeded(Residual).double()
    dense = copy.deepcopy(model)
    freeze_norms(dense)
    x = normal(4, 3, 9, 9, dtype=torch.float64)
    tuner = prepared(model)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    before = snapshot(model)
    for net in (model, dense):
        net(x).square().sum().backward()
    optimizer.step()
    table, selection = tuner.plan.table, dict(tuner.selection.items())
    tuner.finish()
    for layer in table:
        expected = before[layer.parameter].clone()
        mask = torch.zeros_like(expected)
        mask[:, selection[layer.name].tolist() if layer.name in selection else []] = 1
        expected -= 0.1 * mask * gradient_of(dense.get_parameter(layer.parameter))
        assert relative_error(model.get_parameter(layer.parameter), expected) < 1e-12


# -- draws -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), epochs=st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(max_examples=15)
def test_resample_is_a_pure_function_of_seed_and_epoch(seed: int, epochs: list[int]) -> None:
    tuner = prepared(seed=seed)
    drawn = {epoch: tuner.resample(epoch).digest for epoch in epochs}
    for epoch in reversed(epochs):
        assert tuner.resample(epoch).digest == drawn[epoch]
    other = prepared(seed=seed)
    assert other.resample(epochs[-1]).digest == drawn[epochs[-1]]
    tuner.finish()
    other.finish()


def test_dynamic_policies_draw_anew_and_static_ones_do_not() -> None:
    for policy, count in {"dynamic-random": 5, "static-random": 1, "full": 1, "head": 1}.items():
        tuner = prepared(policy=policy, budget="elements:100000" if policy == "full" else "elements:1500")
        assert len({tuner.resample(epoch).digest for epoch in range(5)}) == count, policy
        tuner.finish()


def test_a_redraw_within_an_epoch_is_other_channels_for_dynamic_policies_and_survives_a_restart() -> None:
    for policy, count in {"trady": 4, "trady+": 4, "dynamic-random": 4, "static-random": 1, "head": 1}.items():
        tuner, again = (prepared(policy=policy, budget="elements:1500") for _ in range(2))
        drawn = [tuner.resample(2).digest, *(tuner.redraw().digest for _ in range(3))]
        assert len(set(drawn)) == count, policy
        again.load_state_dict(tuner.state_dict())
        assert again.selection == tuner.selection
        assert again.redraw() == tuner.redraw()
        assert tuner.resample(2).digest == drawn[0]
        tuner.finish()
        with pytest.raises(StateError, match="redraw"):
            tuner.redraw()
        again.finish()


def test_training_does_not_move_the_draws() -> None:
    """A restart draws what it would have drawn: nothing but seed and epoch enters."""
    idle, trained = prepared(), prepared()
    train(trained, trained.attach(torch.optim.SGD(trained.parameters(), lr=0.1)))
    assert idle.resample(7) == trained.resample(7)
    idle.finish()
    trained.finish()


# -- after the end -----------------------------------------------------------------------------------------------


def test_a_finished_tuner_refuses_everything_with_a_reason() -> None:
    tuner = prepared()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    state = tuner.state_dict()
    tuner.finish()
    for call in (
        optimizer.step,
        lambda: tuner.resample(1),
        tuner.finish,
        tuner.delta,
        tuner.state_dict,
        lambda: tuner.load_state_dict(state),
        lambda: tuner.attach(optimizer),
        lambda: tuner.ledger(lambda: None),
    ):
        with pytest.raises(StateError, match="finished"):
            call()


def test_a_model_is_prepared_once_at_a_time() -> None:
    model = seeded(Residual)
    tuner = prepared(model)
    before = tuner.selection
    with pytest.raises(StateError, match=r"finish\(\)"):
        prepared(model)
    with pytest.raises(StateError, match=r"finish\(\)"):
        prepared(nn.Sequential(model, nn.Linear(5, 2)))
    with pytest.raises(StateError, match=r"finish\(\)"):
        trady.prepare(model.blocks, normal(2, 8, 5, 5), budget="elements:100", policy="static-random", head=())
    train(tuner, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01)))
    tuner.resample(0)
    assert tuner.selection == before
    tuner.finish()
    prepared(model).finish()


def test_a_plan_may_be_made_of_a_model_that_trains() -> None:
    tuner = prepared()
    plain = trady.plan(seeded(Residual), data()[0][0], budget="elements:700", policy="dynamic-random")
    assert (
        trady.plan(tuner.model, data()[0][0], budget="elements:700", policy="dynamic-random").to_json()
        == plain.to_json()
    )
    tuner.finish()


def test_a_failed_prepare_leaves_the_model_alone() -> None:
    model = seeded(Residual)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    for options, error in (
        ({"budget": "elements:1"}, BudgetError),
        ({"budget": "-3 MiB"}, BudgetError),
        ({"budget": "a lot"}, BudgetError),
        ({"budget": None}, BudgetError),
        ({"budget": "peak:1 KiB"}, BudgetError),
        ({"policy": "dynamic-randm"}, PolicyError),
        ({"head": "nothing"}, ModelError),
        ({"policy": "trady", "ranking": trady.LayerRanking({"other": 1.0})}, RankingError),
    ):
        with pytest.raises(error):
            prepared(model, **options)
        assert [len(m._forward_hooks) for m in model.modules()] == hooks
        assert all(p.requires_grad for p in model.parameters())
    prepared(model).finish()


def test_an_unknown_policy_is_answered_with_the_nearest() -> None:
    with pytest.raises(PolicyError, match="did you mean 'dynamic-random'"):
        prepared(policy="dynamic_randm")


def test_a_step_whose_backward_comes_after_a_draw_is_refused() -> None:
    tuner = prepared()
    loss = tuner.model(data()[0][0]).sum()
    tuner.resample(1)
    with pytest.raises(StateError, match="resample"):
        loss.backward()
    tuner.finish()


def test_a_model_that_was_moved_after_prepare_is_refused() -> None:
    model, example = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(2, 6)
    tuner = trady.prepare(model, example, budget="elements:1000")
    model.to("meta")
    with pytest.raises(StateError, match="moved or replaced"):
        model(example.to("meta"))
    assert tuner.selection.count
