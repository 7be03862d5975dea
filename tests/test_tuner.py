"""The tuner: what trains, what stays, what a restart and a delta bring back, and what a budget holds."""

from __future__ import annotations

import copy
import importlib
import io
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trady
from tests.models import (
    IMAGE_NETWORKS,
    Functional,
    Grouped,
    Residual,
    Tokens,
    channels_of,
    freeze_norms,
    normal,
    relative_error,
    same,
    seeded,
    snapshot,
)
from trady.errors import BudgetError, CheckpointError, ModelError, PolicyError, RankingError, StateError
from trady.model.batch import Batch
from trady.ranking.scores import layer_score

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adafactor of transformers": lambda p: importlib.import_module("transformers.optimization").Adafactor(
        p, lr=0.01, relative_step=False, scale_parameter=False
    ),
}  # fmt: skip

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def data(batches: int = 8, batch: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x = normal(batches * batch, 3, 9, 9, seed=seed)
    y = (x.mean((1, 2, 3)) * 40).long().remainder(5)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def train(
    tuner: trady.Tuner, optimizer: torch.optim.Optimizer, epochs: range = range(2), steps: int = 4
) -> list[float]:
    losses = []
    for epoch in epochs:
        tuner.resample(epoch)
        for x, y in data()[:steps]:
            optimizer.zero_grad()
            loss = F.cross_entropy(tuner.model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def prepared(model: nn.Module | None = None, **options: Any) -> trady.Tuner:
    model = seeded(Residual) if model is None else model
    return trady.prepare(model, data()[0][0], **{"budget": "elements:1500", "policy": "dynamic-random", **options})


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
    table, head = tuner.plan.table, {n for n, p in model.named_parameters() if p.requires_grad}
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
        expected -= 0.1 * mask * dense.get_parameter(layer.parameter).grad
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


# -- optimizers --------------------------------------------------------------------------------------------------


def rows_of_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """State with a row for every channel."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value.clone()
        for name, value in state.items()
        if isinstance(value, Tensor) and (value.dim() == parameter.dim() or name == "exp_avg_sq_row")
        and value.shape[0] == len(parameter)
        and not (name == "col_var" and parameter.dim() == 2)
    }  # fmt: skip


@every_optimizer
def test_state_of_channels_that_stay_is_kept_and_of_others_dropped(make: Callable[..., torch.optim.Optimizer]) -> None:
    tuner = prepared(budget="elements:4000")
    optimizer = tuner.attach(make(tuner.parameters()))
    stayed = 0
    for epoch in range(4):
        train(tuner, optimizer, range(epoch, epoch + 1), 3)
        selection = {name: channels.tolist() for name, channels in tuner.selection.items()}
        compacts = {
            layer.name: dict(tuner.named_parameters())[f"{layer.parameter}.channels"] for layer in tuner.plan.table
        }
        before = {name: rows_of_state(optimizer, compact) for name, compact in compacts.items()}
        now = tuner.resample(epoch + 1)
        for name, compact in compacts.items():
            channels = now.channels.get(name, np.empty(0, dtype=np.int64)).tolist()
            state = optimizer.state.get(compact, {})
            staying = [c for c in channels if c in selection.get(name, ())]
            for key, value in rows_of_state(optimizer, compact).items():
                assert len(value) == len(channels)
                for channel in staying:
                    old = before[name][key][selection[name].index(channel)]
                    assert torch.equal(value[channels.index(channel)], old), (name, key)
                    stayed += 1
            if not channels:
                assert not any(isinstance(v, Tensor) and v.numel() > 1 for v in state.values())
            assert all(
                v.shape[0] == len(channels) for k, v in state.items()
                if isinstance(v, Tensor) and v.dim() == compact.dim() and k != "col_var"
            )  # fmt: skip
    if optimizer.state and not (isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]):
        assert stayed > 0
    tuner.finish()


@every_optimizer
def test_every_optimizer_trains_through_draws_in_which_nothing_stays(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    class Alternating:
        name, uses_ranking = "alternating", False

        def select(self, draw: Any) -> trady.Selection:
            sets = [{"stem.0": [0], "2": []}, {"stem.0": [1, 2], "blocks.0.conv1": [3]}, {"blocks.0.conv1": [1]}, {}]
            wanted = sets[draw.epoch % 4]
            return trady.Selection({n: c for n, c in wanted.items() if n in draw.table.names})

    tuner = prepared(policy=Alternating(), budget="elements:100000")
    optimizer = tuner.attach(make(tuner.parameters()))
    losses = train(tuner, optimizer, range(9), 2)
    assert all(np.isfinite(losses))
    weights = snapshot(tuner.finish())
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


@every_optimizer
def test_linear_layers_train_through_draws_of_one_channel(make: Callable[..., torch.optim.Optimizer]) -> None:
    """One row is the size of a column statistic: the two must not be taken for each other."""

    class Growing:
        name, uses_ranking = "growing", False

        def select(self, draw: Any) -> trady.Selection:
            return trady.Selection({"1": [[3], [3, 5, 6], [5], [1, 5]][draw.epoch % 4]})

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(243, 9), nn.ReLU(), nn.Linear(9, 5))

    tuner = prepared(seeded(build), policy=Growing(), budget="elements:100000")
    optimizer = tuner.attach(make(tuner.parameters()))
    assert all(np.isfinite(train(tuner, optimizer, range(6), 2)))
    tuner.finish()


def test_one_channel_that_stays_trains_as_if_nothing_else_had_been_there() -> None:
    """AdamW with a growing and shrinking neighbourhood equals AdamW on that channel alone."""

    class Neighbours:
        uses_ranking = False

        def __init__(self, alone: bool) -> None:
            self.name, self.alone = f"neighbours {alone}", alone

        def select(self, draw: Any) -> trady.Selection:
            return trady.Selection({"stem.0": [1] if self.alone or draw.epoch % 2 == 0 else [0, 1, 2]})

    ends = []
    for alone in (True, False):
        model = seeded(Residual).double()
        tuner = trady.prepare(
            model, normal(4, 3, 9, 9, dtype=torch.float64), budget="elements:99999", policy=Neighbours(alone), head=()
        )
        optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
        for epoch in range(4):
            tuner.resample(epoch)
            for _ in range(2):
                optimizer.zero_grad()
                # A loss whose gradient does not depend on the weights.
                model.stem[0](normal(2, 3, 9, 9, dtype=torch.float64)).sum().backward()
                optimizer.step()
        ends.append(tuner.finish().stem[0].weight[:, 1].detach())
    assert relative_error(*ends) < 1e-12


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (OPTIMIZERS[n], c)
        for n, c in [("SGD", 0), ("momentum", 1), ("Adam", 2), ("AdamW", 2), ("amsgrad", 3), ("RMSprop", 3)]
    ],
)
def test_optimizer_state_is_counted(make: Callable[..., torch.optim.Optimizer], copies: int) -> None:
    tuner = prepared(budget="update:60 KiB")
    optimizer = tuner.attach(make(tuner.parameters()))
    cost = tuner.cost()
    assert cost.update_bytes == cost.saved_channel_bytes + cost.compact_bytes * (2 + copies) <= 60 * 1024
    train(tuner, optimizer)
    compacts = [p for n, p in tuner.named_parameters() if n.endswith(".channels")]
    held = sum(
        v.nbytes for p in compacts for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.dim()
    )
    assert held <= copies * tuner.cost().compact_bytes
    tuner.finish()


def test_attach_refuses_an_optimizer_without_our_parameters_and_lbfgs() -> None:
    tuner = prepared()
    with pytest.raises(StateError, match=r"tuner\.parameters\(\)"):
        tuner.attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(StateError, match="LBFGS"):
        tuner.attach(torch.optim.LBFGS(tuner.parameters()))
    tuner.finish()


def test_several_optimizers_and_parameter_groups() -> None:
    tuner = prepared()
    named = dict(tuner.named_parameters())
    channels = [p for n, p in named.items() if n.endswith(".channels")]
    head = [p for n, p in named.items() if not n.endswith(".channels")]
    first = tuner.attach(torch.optim.AdamW([{"params": channels, "lr": 0.01, "weight_decay": 0.0}]))
    second = tuner.attach(torch.optim.SGD(head, lr=0.1))
    before = snapshot(tuner.model)
    for epoch in range(3):
        tuner.resample(epoch)
        tuner.model(data()[0][0]).square().sum().backward()
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    after = snapshot(tuner.finish())
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert any(not torch.equal(before[n], after[n]) for n in before if "conv" in n)


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


# -- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["trady", "dynamic-random", "static-random"])
@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["AdamW"]], ids=["momentum", "AdamW"])
@pytest.mark.parametrize("when", [1, 3, 5])
def test_a_restart_goes_on_bit_for_bit(policy: str, make: Callable[..., torch.optim.Optimizer], when: int) -> None:
    def run(stop: int | None) -> tuple[list[float], dict[str, Tensor]]:
        model = seeded(Residual)
        tuner = prepared(model, policy=policy)
        optimizer = tuner.attach(make(tuner.parameters()))
        losses: list[float] = []
        for step in range(9):
            epoch, within = divmod(step, 4)
            if within == 0:
                tuner.resample(epoch)
            if step == stop:
                file = io.BytesIO()
                torch.save((tuner.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                state, moments = torch.load(file, weights_only=False)
                state = {"tensors": state["tensors"], "meta": json.loads(json.dumps(state["meta"]))}
                tuner.finish()
                model = seeded(Residual)
                tuner = prepared(model, policy=policy)
                optimizer = tuner.attach(make(tuner.parameters()))
                tuner.load_state_dict(state)
                optimizer.load_state_dict(moments)
            x, y = data()[step % 8]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, snapshot(tuner.finish())

    (expected, weights), (losses, restarted) = run(None), run(when)
    assert losses == expected
    assert same(weights, restarted)


def test_a_state_of_another_run_is_refused_and_nothing_changes() -> None:
    tuner = prepared()
    train(tuner, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1)))
    state = tuner.state_dict()
    tuner.finish()

    def meta(**changes: Any) -> dict[str, Any]:
        return {**state, "meta": {**state["meta"], **changes}}

    target = prepared()
    before, selection = snapshot(target.model), target.selection
    lacking = {k: v for k, v in state["meta"].items() if k != "selection"}
    for wrong, words in (
        ({}, "no state"),
        ({"meta": {}}, "no state"),
        (meta(version=99), "version 99"),
        (meta(seed=5), "seed 5"),
        (meta(policy="trady"), "policy 'trady'"),
        (meta(structure="0" * 16), "structure"),
        ({**state, "meta": lacking}, "selection"),
        (meta(pool=["nothing"]), "damaged"),
        (meta(epoch="x"), "damaged"),
        ({**state, "tensors": {"nothing::whole": torch.zeros(1)}}, "nothing"),
        (meta(selection={"nothing": [1]}), "damaged"),
        (meta(selection={"stem.0": [99]}), "damaged"),
    ):
        with pytest.raises(CheckpointError, match=words):
            target.load_state_dict(wrong)
        assert same(snapshot(target.model), before)
        assert target.selection == selection
    train(target, target.attach(torch.optim.SGD(target.parameters(), lr=0.1)))
    target.finish()


# -- deltas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (Residual, normal(2, 3, 9, 9)),
        (Grouped, normal(2, 3, 17, 17)),
        (Functional, normal(2, 3, 9, 9)),
        (Tokens, torch.zeros(2, 6, dtype=torch.int64)),
    ],
    ids=["residual", "grouped", "functional", "tokens"],
)
def test_base_and_delta_are_the_finished_model_bit_for_bit(
    build: Callable[[], nn.Module], example: Tensor, tmp_path: Any
) -> None:
    from safetensors.torch import load_file, save_file

    model = seeded(build)
    tuner = trady.prepare(model, example, budget="elements:500", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    for epoch in range(3):
        tuner.resample(epoch)
        model(example).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuner.delta()
    finished = snapshot(tuner.finish())
    save_file(delta, tmp_path / "delta.safetensors")
    base = seeded(build)
    assert trady.apply_delta(base, load_file(tmp_path / "delta.safetensors")) is base
    assert same(snapshot(base), finished)
    assert sum(t.numel() for n, t in delta.items() if n.endswith("::values")) < sum(
        p.numel() for p in model.parameters()
    )


def test_a_delta_of_another_model_is_refused_and_the_model_left_as_it_was() -> None:
    tuner = prepared()
    train(tuner, tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1)))
    delta = tuner.delta()
    tuner.finish()
    first = next(iter(delta)).rpartition("::")[0]
    for model, wrong in (
        (seeded(Grouped), delta),
        (seeded(lambda: Residual(width=4)), delta),
        (seeded(lambda: Residual(classes=3)), delta),
        (seeded(Residual), {**delta, "more::whole": torch.zeros(1)}),
        (seeded(Residual), {**delta, "head.bias::half": torch.zeros(5)}),
        (seeded(Residual), {n: t for n, t in delta.items() if n != f"{first}::values"}),
        (seeded(Residual), {**delta, f"{first}::channels": delta[f"{first}::channels"] + 1000}),
        (seeded(Residual), {**delta, f"{first}::channels": -1 - delta[f"{first}::channels"]}),
        (seeded(Residual), {**delta, f"{first}::groups": torch.tensor([3])}),
    ):
        before = snapshot(model)
        with pytest.raises(CheckpointError):
            trady.apply_delta(model, wrong)
        assert same(snapshot(model), before)


# -- budgets -----------------------------------------------------------------------------------------------------

NETWORKS = ["residual", "pre-activation", "grouped", "padded", "shared layer", "dense", "perceptron", "conv1d"]


def step_of(tuner: trady.Tuner, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        F.cross_entropy(tuner.model(x), torch.zeros(len(x), dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_draw_exceeds_the_budget_in_elements(name: str, seed: int) -> None:
    build, shape = IMAGE_NETWORKS[name]
    for policy in ("dynamic-random", "trady", "static-random"):
        tuner = trady.prepare(seeded(build), normal(3, *shape), budget="elements:700", policy=policy, seed=seed)
        for epoch in range(4):
            tuner.resample(epoch)
            left = 700 - tuner.cost().elements
            assert left >= 0
            pool = tuner.plan.pool
            for layer in tuner.plan.table:  # no channel that would still fit is left out
                full = len(tuner.selection.channels.get(layer.name, ())) == layer.channels
                assert layer.name not in pool or full or layer.elements > left
        tuner.finish()


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_updating_adds_stays_inside_an_update_budget(name: str, optimizer_name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    x = normal(8, *shape)
    tuner = trady.prepare(seeded(build), x, budget="update:24 KiB", policy="dynamic-random", seed=1)
    optimizer = tuner.attach(OPTIMIZERS[optimizer_name](tuner.parameters()))
    compacts = [p for n, p in tuner.named_parameters() if n.endswith(".channels")]
    for epoch in range(3):
        tuner.resample(epoch)
        ledger = tuner.ledger(step_of(tuner, optimizer, x), inference=False)
        state = sum(
            v.nbytes for p in compacts for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.dim()
        )
        added = ledger.saved_bytes_of("channels") + 2 * sum(p.nbytes for p in compacts) + state
        assert added == tuner.cost().update_bytes <= 24 * 1024
    tuner.finish()


@pytest.mark.parametrize("optimizer_name", ["SGD", "momentum", "AdamW"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_stays_inside_a_peak_budget(name: str, optimizer_name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    x = normal(16, *shape)
    generous = trady.plan(seeded(build), x, budget="peak:1 GiB", policy="full")
    assert generous.predicted_peak_bytes is not None
    for share in (0.15, 0.6):
        for seed in (0, 1):
            model = seeded(build)
            least = least_peak(model, x)
            amount = int(least + share * (generous.predicted_peak_bytes - least)) + least // 4
            tuner = trady.prepare(model, x, budget=f"peak:{amount} B", policy="dynamic-random", seed=seed)
            try:
                optimizer = tuner.attach(OPTIMIZERS[optimizer_name](tuner.parameters()))
            except BudgetError:
                assert optimizer_name != "SGD"
                tuner.finish()
                continue
            for epoch in range(2):
                tuner.resample(epoch)
                step = step_of(tuner, optimizer, x)
                for _ in range(2):  # the second has its state from the start
                    ledger = tuner.ledger(step, inference=False)
                    predicted = tuner.plan.predicted_peak_bytes
                    assert predicted is not None
                    assert ledger.peak_bytes <= amount, (share, seed, epoch)
                    assert ledger.peak_bytes <= 1.01 * predicted, (share, seed, epoch)
            tuner.finish()


def least_peak(model: nn.Module, x: Tensor) -> int:
    with pytest.raises(BudgetError) as refused:
        trady.prepare(model, x, budget="peak:1 B", policy="dynamic-random")
    return named_bytes(str(refused.value))


def named_bytes(message: str) -> int:
    """The amount of bytes that a refusal asks for, typed as a budget."""
    import re

    from trady.planning.budget import parse_budget

    found = re.findall(r"(?:peak|update|elements):[\d.]+(?: ?[kKMG]?i?B)?", message)
    return parse_budget(found[-1]).amount


@pytest.mark.parametrize("scope", ["elements", "update", "peak"])
def test_a_budget_below_the_least_is_refused_and_the_least_is_accepted(scope: str) -> None:
    unit = "" if scope == "elements" else " B"
    with pytest.raises(BudgetError) as refused:
        prepared(budget=f"{scope}:1{unit}")
    least = named_bytes(str(refused.value))
    assert least > 1
    tuner = prepared(budget=f"{scope}:{least}{unit}")
    assert scope == "peak" or tuner.cost().channels == 1
    tuner.finish()
    if scope != "peak":
        with pytest.raises(BudgetError):
            prepared(budget=f"{scope}:{least - 1}{unit}")


def test_an_optimizer_whose_state_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError) as refused:
        prepared(budget="update:1 B")
    least = named_bytes(str(refused.value))
    tuner = prepared(budget=f"update:{least} B")
    with pytest.raises(BudgetError):
        tuner.attach(torch.optim.AdamW(tuner.parameters()))
    assert tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    tuner.finish()


def test_a_plan_is_what_prepare_does() -> None:
    plan = trady.plan(seeded(Residual), data()[0][0], budget="peak:200 KiB", policy="dynamic-random", seed=4)
    tuner = trady.prepare(
        seeded(Residual), data()[0][0], plan=trady.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    )
    assert tuner.selection == plan.selection
    assert tuner.plan.to_json() == plan.to_json()
    tuner.finish()
    with pytest.raises(ModelError, match="other layers"):
        trady.prepare(seeded(Grouped), normal(2, 3, 17, 17), plan=plan)


def test_the_simulated_step_is_the_measured_one_to_the_byte() -> None:
    import trady.simulation.simulator as simulate
    from trady.analysis.model_analysis import analyse_model

    for build in (Residual, Grouped):
        model, x = seeded(build), normal(8, 3, 17, 17)
        model.train()
        analysis = analyse_model(model, x)
        hollow = simulate.Simulator(model, x, analysis).timeline(layers=analysis.table.names)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulate, "meta_copy", copy.deepcopy)
            patch.setattr(Batch, "meta", property(lambda batch: batch))
            real = simulate.Simulator(model, x, analysis).timeline(layers=analysis.table.names)
        assert hollow.intervals == real.intervals


# -- the online ranking ------------------------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """Takes the labels with the batch, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), labels)


def test_a_ledger_remembers_the_labels_of_a_model_with_its_own_loss() -> None:
    model = seeded(OwnLoss, 0)
    x, labels = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 0])
    tuner = trady.prepare(model, (x, labels), budget="update:1 MiB")
    ledger = tuner.ledger(lambda: model(x, labels).backward())
    assert ledger.inference_peak_bytes is not None
    assert ledger.input_bytes == x.nbytes + labels.nbytes
    tuner.finish()


class Deep(nn.Module):
    """Layers whose gradients differ by orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 8, 12, 12, 16, 16]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 + i % 2, padding=1, bias=False) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(16, 5)
        for i, norm in enumerate(self.norms):
            nn.init.constant_(norm.weight, 0.4 + 0.5 * (i % 3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


def offline(model: nn.Module, table: trady.ChannelTable, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Layer RGN from the dense gradients, averaged over batches."""
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    squares = {layer.name: np.zeros(layer.channels) for layer in table}
    for x, y in batches:
        dense.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        for layer in table:
            gradient = dense.get_parameter(layer.parameter).grad
            squares[layer.name] += gradient.double().square().sum((0, 2, 3)).numpy() / len(batches)
    return {layer.name: layer_score(squares[layer.name], layer, "rgn") for layer in table}


def test_the_online_ranking_settles_on_what_all_gradients_say() -> None:
    batches = [(normal(16, 3, 16, 16, seed=s), torch.arange(16).remainder(5)) for s in range(10)]
    model = seeded(Deep)
    tuner = trady.prepare(model, batches[0][0], budget="elements:4000")
    assert tuner.plan.ranking == "online"
    assert set(tuner.plan.pool) == set(tuner.plan.table.names)
    truth = trady.LayerRanking(offline(model, tuner.plan.table, batches))
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.0))
    digests = []
    for step in range(60):
        x, y = batches[step % 10]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(tuner.selection.digest)
    tuner.resample(1)
    learnt = tuner.ranking
    assert learnt is not None
    assert learnt.source == "online"
    assert learnt.spearman(truth) >= 0.8
    found, expected = set(tuner.plan.pool), set(truth.top(0.97))
    assert len(found & expected) >= len(expected) - 1
    assert len(set(digests)) > 5  # drawn anew while it was learnt
    assert set(tuner.selection) <= found
    tuner.finish()


def test_the_ranking_in_the_making_is_part_of_the_state() -> None:
    model = seeded(Residual)
    tuner = prepared(model, policy="trady")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.0))
    for x, y in data()[:5]:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = json.loads(json.dumps(tuner.state_dict()["meta"]))
    assert state["online"]["batches"] == 5
    twin = prepared(policy="trady")
    twin.load_state_dict({"meta": state, "tensors": tuner.delta()})
    assert twin.ranking == tuner.ranking
    assert twin.selection == tuner.selection
    assert twin.resample(1) == tuner.resample(1)
    assert twin.plan.pool == tuner.plan.pool
    tuner.finish()
    twin.finish()


def test_a_given_ranking_makes_the_pool_at_once() -> None:
    names = prepared_names()
    scores = {name: (100.0 if name in ("stem.0", "blocks.1.conv2") else 0.1) for name in names}
    tuner = prepared(policy="trady", ranking=trady.LayerRanking(scores))
    assert set(tuner.plan.pool) == {"stem.0", "blocks.1.conv2"}
    for epoch in range(3):
        assert set(tuner.resample(epoch)) <= {"stem.0", "blocks.1.conv2"}
    tuner.finish()


def prepared_names() -> tuple[str, ...]:
    tuner = prepared()
    names = tuner.plan.table.names
    tuner.finish()
    return names


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
