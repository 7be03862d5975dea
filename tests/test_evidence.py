"""Policies that measure before they draw: what is measured, what it costs, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import IMAGE_NETWORKS, Grouped, Residual, freeze_norms, normal, same, seeded, snapshot
from tests.tight_budget import predicted_peak
from tests.tuned import observed
from trady.channels.selection import Selection
from trady.errors import CheckpointError, ModelError, PolicyError, StateError
from trady.policies import Draw, Evidence, Needs
from trady.policies.evidence import needs_of
from trady.policies.fill import fill_by_score

NETWORKS = ["residual", "grouped", "shared layer", "perceptron", "conv1d"]


class Largest:
    """A user's own policy in one class: largest value of one measure first."""

    uses_ranking = False

    def __init__(self, kind: str, *, each_epoch: bool = False) -> None:
        self.name = f"largest-{kind}"
        self.needs = Needs((kind,), each_epoch)

    def select(self, draw: Draw) -> Selection:
        return fill_by_score(draw, draw.table.layers, draw.measured(self.needs.kinds[0]))


def data(shape: tuple[int, ...] = (3, 9, 9), batches: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(normal(size, *shape, seed=s), torch.arange(size).remainder(3)) for s in range(batches)]


def prepared(model: nn.Module, x: Tensor, policy: Any, budget: str = "elements:5000", **options: Any) -> trady.Tuner:
    return trady.prepare(model, x, budget=budget, policy=policy, **options)


def dense_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    dense = copy.deepcopy(model).requires_grad_(True)
    freeze_norms(dense)
    F.cross_entropy(dense(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}


def by_channel(layer: trady.Layer, tensor: Tensor) -> Tensor:
    """[channels, everything else] of a dense weight or its gradient."""
    if layer.kind == "addmm":
        return tensor
    return tensor.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


# -- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("residual", "elements:1500"),
        ("residual", "update:40 KiB"),
        ("residual", "peak:1 MiB"),
        *((name, "elements:4000") for name in NETWORKS[1:]),
    ],
)
def test_observed_gradients_are_those_of_the_dense_model_whatever_the_budget(name: str, budget: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    batches, model = data(shape), seeded(build).eval()
    expected = [dense_gradients(model, batch) for batch in batches]
    tuner = prepared(model, batches[0][0], Largest("gradients"), budget)
    measured = observed(tuner, batches)["gradients"]
    for layer in tuner.plan.table:
        norms = [by_channel(layer, g[layer.parameter]).double().square().sum(1) for g in expected]
        wanted = torch.stack(norms).mean(0).numpy()
        np.testing.assert_allclose(measured[layer.name], wanted, rtol=2e-3, atol=1e-9)
    tuner.finish()


@pytest.mark.parametrize("name", NETWORKS)
def test_weight_norms_are_known_as_soon_as_the_model_is_prepared(name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    model = seeded(build)
    tuner = prepared(model, normal(2, *shape), Largest("weights"), "elements:700")
    assert tuner.selection.count
    assert not tuner.observation_due
    scores = {}
    for layer in tuner.plan.table:
        scores[layer.name] = by_channel(layer, model.get_parameter(layer.parameter).detach()).norm(dim=1).numpy()
        measured = observed(tuner, (), None)["weights"][layer.name]
        np.testing.assert_allclose(measured, scores[layer.name], rtol=1e-5)
    tuner.finish()


def test_what_is_not_finite_counts_as_nothing() -> None:
    tuner = prepared(seeded(Residual), data()[0][0], Largest("gradients"))
    measured = observed(tuner, data(), lambda scores, labels: F.cross_entropy(scores, labels) * float("inf"))
    assert all((values == 0).all() for values in measured["gradients"].values())
    tuner.finish()


def test_parts_of_a_batch_measure_what_the_whole_batch_does() -> None:
    batches = data(size=6)
    found = []
    for micro_batch in (None, 2):
        tuner = prepared(seeded(Residual), batches[0][0], Largest("gradients"), "peak:2 MiB", micro_batch=micro_batch)
        found.append(observed(tuner, batches)["gradients"])
        tuner.finish()
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-3, atol=1e-10)


# -- inside the budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dynamic-rgn", "fisher"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_observing_stays_inside_a_peak_budget(name: str, optimizer: str, policy: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    model = seeded(build)
    batch = (normal(16, *shape), torch.zeros(16, dtype=torch.int64))
    generous = predicted_peak(trady.plan(model, batch[0], budget="peak:1 GiB", policy="full"))
    tuner = prepared(model, batch[0], policy, f"peak:{int(0.8 * generous)} B")
    made = tuner.attach(getattr(torch.optim, optimizer)(tuner.parameters(), lr=0.01))
    assert tuner.plan.budget is not None
    amount = tuner.plan.budget.amount
    for epoch in range(2):
        ledger = tuner.ledger(lambda: tuner.observe([batch], F.cross_entropy), inference=False)
        assert ledger.peak_bytes <= amount
        tuner.resample(epoch)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        made.step()
        made.zero_grad()
    tuner.finish()


@pytest.mark.parametrize("policy", ["dynamic-rgn", "fisher"])
def test_no_sweep_takes_more_elements_than_the_budget_has(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = data()
    tuner = prepared(seeded(Residual), batches[0][0], policy, "elements:900")
    taken: list[Selection] = []
    select = tuner._armed.select

    def taking(selection: Selection) -> Any:
        taken.append(selection)
        return select(selection)

    monkeypatch.setattr(tuner._armed, "select", taking)
    tuner.observe(batches, F.cross_entropy)
    assert len({each.digest for each in taken}) > 3
    assert all(tuner.plan.table.elements(each) <= 900 for each in taken)
    covered = {(name, c) for each in taken for name, channels in each.items() for c in channels.tolist()}
    assert covered == {(layer.name, c) for layer in tuner.plan.table for c in range(layer.channels)}
    tuner.finish()


# -- it leaves no trace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "in-backward"])
def test_observing_changes_nothing_of_a_training(optimizer: str) -> None:
    """Two trainings, one of which observes between every two steps, end with the same bits."""
    ends = []
    for watched in (False, True):
        model, batches = seeded(Residual), data(batches=4)
        tuner = prepared(model, batches[0][0], Largest("gradients", each_epoch=True), seed=3)
        if optimizer == "in-backward":
            made: Any = trady.optim.AdamW(tuner.parameters(), lr=0.01)
        else:
            made = getattr(torch.optim, optimizer)(tuner.parameters(), lr=0.01)
        tuner.attach(made)
        tuner.observe(batches[:1], F.cross_entropy)
        tuner.resample(0)
        torch.manual_seed(0)
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            if watched:
                before = {n: None if p.grad is None else p.grad.clone() for n, p in tuner.named_parameters()}
                selection, flags = tuner.selection, [p.requires_grad for p in model.parameters()]
                random = torch.random.get_rng_state()
                tuner.observe(batches, F.cross_entropy)
                assert torch.equal(torch.random.get_rng_state(), random)
                assert tuner.selection == selection
                assert [p.requires_grad for p in model.parameters()] == flags
                for name, parameter in tuner.named_parameters():
                    old, new = before[name], parameter.grad
                    assert (old is None) == (new is None)
                    assert old is None or new is None or torch.equal(old, new)
            made.step()
            made.zero_grad()
        state = [v for s in made.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
        ends.append((snapshot(tuner.finish()), state))
    assert same(ends[0][0], ends[1][0])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_an_error_in_the_middle_leaves_the_selection_and_the_gradients() -> None:
    batches = data()
    tuner = prepared(seeded(Residual), batches[0][0], "dynamic-norm")
    tuner.observe(batches, F.cross_entropy)
    selection, before = tuner.selection, snapshot(tuner.model)
    with pytest.raises(ModelError, match="no loss of its own"):
        tuner.observe(batches)
    with pytest.raises(ModelError, match="a pair"):
        tuner.observe([batches[0][0]], F.cross_entropy)
    assert tuner.selection == selection
    F.cross_entropy(tuner.model(batches[0][0]), batches[0][1]).backward()
    assert same(snapshot(tuner.model), before)
    tuner.finish()


# -- when --------------------------------------------------------------------------------------------------------


def test_nothing_trains_before_something_was_measured() -> None:
    batches = data()
    tuner = prepared(seeded(Residual), batches[0][0], "static-rgn")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    assert (tuner.observation_due, tuner.selection.count) == (True, 0)
    for wish in (lambda: tuner.resample(0), optimizer.step):
        with pytest.raises(StateError, match=r"'static-rgn' draws from measured gradients.*tuner\.observe"):
            wish()
    with pytest.raises(StateError, match="no batch"):
        tuner.observe([], F.cross_entropy)
    tuner.observe(batches, F.cross_entropy)
    assert tuner.selection.count
    assert tuner.resample(0) == tuner.selection
    optimizer.step()
    tuner.finish()


def test_a_static_policy_measures_once_and_a_dynamic_one_before_every_epoch() -> None:
    batches = data()
    for policy, each_epoch in (("static-rgn", False), ("dynamic-rgn", True)):
        model = seeded(Residual)
        tuner = prepared(model, batches[0][0], policy, "elements:1500")
        optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.5))
        tuner.observe(batches, F.cross_entropy)
        first = tuner.resample(0)
        assert tuner.observation_due is each_epoch
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if each_epoch:
            with pytest.raises(StateError, match=r"measured for epoch 0; call tuner\.observe.*resample\(1\)"):
                tuner.resample(1)
        tuner.observe(batches, F.cross_entropy)
        assert tuner.selection == first
        assert (tuner.resample(1) != first) is each_epoch
        assert tuner.resample(1) == tuner.selection
        tuner.finish()


def test_a_policy_that_measures_nothing_looks_at_no_batch() -> None:
    tuner = prepared(seeded(Residual), data()[0][0], "dynamic-random")
    assert tuner.observe(iter(())) is None
    assert not tuner.observation_due
    tuner.finish()


def test_a_plan_says_what_is_measured_and_accounts_for_a_draw_of_that_size() -> None:
    with torch.device("meta"):
        hollow = Residual()
    plan = trady.plan(hollow, torch.empty(4, 3, 9, 9, device="meta"), budget="elements:1500", policy="dynamic-norm")
    assert plan.needs == ("gradients",)
    assert plan.needs_each_epoch
    assert not plan.observed
    assert 1000 < plan.cost.elements <= 1500
    assert "before every epoch; until then, a uniform draw" in " ".join(str(plan).split())
    assert trady.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# -- a restart ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["static-rgn", "dynamic-rgn"])
def test_evidence_goes_through_a_state(policy: str) -> None:
    batches = data()
    tuner = prepared(seeded(Residual), batches[0][0], policy)
    tuner.observe(batches, F.cross_entropy)
    tuner.resample(0)
    state = tuner.state_dict()
    meta = json.loads(json.dumps(state["meta"]))
    twin = prepared(seeded(Residual), batches[0][0], policy)
    twin.load_state_dict({"meta": meta, "tensors": state["tensors"]})
    assert twin.selection == tuner.selection
    assert twin.observe(()) == tuner.observe(()) if policy.startswith("static") else twin.observation_due
    assert twin.resample(0) == tuner.resample(0)
    for wrong in (
        {**meta, "observed": {**meta["observed"], "kinds": ["fisher"]}},
        {**meta, "policy_options": "others"},
    ):
        with pytest.raises(CheckpointError, match=r"measured fisher|policy options 'others'"):
            twin.load_state_dict({"meta": wrong, "tensors": state["tensors"]})
    lacking = {k: t for k, t in state["tensors"].items() if not k.startswith("@evidence/kinds/gradients/stem")}
    assert len(lacking) < len(state["tensors"])
    with pytest.raises(CheckpointError, match="lacks measured gradients of stem"):
        twin.load_state_dict({"meta": meta, "tensors": lacking})
    tuner.finish()
    twin.finish()


# -- values ------------------------------------------------------------------------------------------------------


def test_evidence_cannot_be_changed_and_is_compared_by_what_it_holds() -> None:
    given = np.array([1.0, 2.0])
    evidence = Evidence({"gradients": {"a": given}}, {"outputs/a": np.zeros((2, 3), np.float32)}, 2)
    given[0] = 7
    assert evidence["gradients"]["a"].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        evidence["gradients"]["a"][0] = 3
    assert evidence == Evidence(
        {"gradients": {"a": np.array([1.0, 2.0])}}, {"outputs/a": np.zeros((2, 3), np.float32)}, 2
    )
    assert evidence != Evidence(
        {"gradients": {"a": np.array([1.0, 3.0])}}, {"outputs/a": np.zeros((2, 3), np.float32)}, 2
    )
    with pytest.raises(PolicyError, match="'fisher' was not measured, but gradients"):
        evidence["fisher"]


@pytest.mark.parametrize("make", [lambda: Needs(cast(Any, "gradients")), lambda: Needs(("",))])
def test_needs_are_names(make: Callable[[], Needs]) -> None:
    with pytest.raises(PolicyError, match="tuple of names"):
        make()


def test_what_nothing_measures_is_refused_before_anything_is_armed() -> None:
    model = seeded(Grouped)
    with pytest.raises(PolicyError, match="nothing measures 'hunches'; there are fisher, gradients, velocity, weights"):
        prepared(model, normal(2, 3, 17, 17), Largest("hunches"))
    assert needs_of(object()) == Needs()
    with pytest.raises(PolicyError, match=r"has needs 'gradients'; give trady\.policies\.Needs"):
        needs_of(type("Odd", (), {"name": "odd", "needs": "gradients"})())
    prepared(model, normal(2, 3, 17, 17), "head").finish()
