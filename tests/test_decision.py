"""From a request to a decision: one list of options, frozen decisions, batches and models measured once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Residual, normal, seeded
from tests.recomputed_models import recomputed_model
from tests.small_task import small_data, small_net
from trady.analysis import model_analysis
from trady.analysis.sample_axes import carried_over, samples_of
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.errors import BudgetError
from trady.model.batch import Batch
from trady.planning import budget as budgets
from trady.planning import scopes
from trady.planning.budget import Budget
from trady.planning.request import Request
from trady.planning.scopes import PEAK, BudgetScope
from trady.planning.spending import Spending
from trady.simulation.simulator import Simulator
from trady.trace import forward as recorder

IMAGES = torch.zeros(8, 3, 12, 12)


def by_finetune(**options: Any) -> object:
    images, others = small_data(8, 0), small_data(8, 1)
    asked: dict[str, Any] = {"budget": "elements:2000", "epochs": 1, "out": None, "progress": False, **options}
    return trady.finetune(small_net(), images, others, **asked)


def by_trainer(**options: Any) -> object:
    trainer = pytest.importorskip("trady.integrations.transformers")
    # The mixin alone: it refuses before it makes a Trainer, which would make a folder.
    return trainer.TradyMixin(small_net(), budget="elements:2000", **options)


WAYS: dict[str, Callable[..., object]] = {
    "prepare": lambda **options: trady.prepare(small_net(), IMAGES, budget="elements:2000", **options),
    "plan": lambda **options: trady.plan(small_net(), IMAGES, budget="elements:2000", **options),
    "finetune": by_finetune,
    "Trainer": by_trainer,
    "Request": lambda **options: Request(budget="elements:2000", **options),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"recompute": "some"}, "recompute='some' is not known; type one of auto, all, none"),
        ({"fidelity": "3bit"}, "fidelity='3bit' is not known; type one of exact, 8bit, 4bit"),
        ({"micro_batch": 0}, "micro_batch=0 is neither a number of samples nor auto"),
    ],
)
def test_a_wrong_word_is_one_error_wherever_it_is_said(way: str, option: dict[str, Any], message: str) -> None:
    if way == "Trainer" and "micro_batch" in option:
        return  # the Trainer has its own accumulation
    with pytest.raises(BudgetError, match=message):
        WAYS[way](**option)


def test_a_decision_and_its_moments_cannot_be_changed() -> None:
    decision = Request(budget="elements:2000").decide(small_net(), IMAGES)
    for value, field in (
        (decision, "budget"),
        (decision.start, "optimizer"),
        (decision.spending(decision.start), "seed"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)


def adam(tuner: trady.Tuner) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuner.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", ["BERT", "ViT, by hand"])
def test_a_refused_optimizer_leaves_the_tuner_as_it_was(name: str) -> None:
    model, batch = recomputed_model(name, torch.float32)
    minimum = peak_of_minimum(model, batch)
    tuner = trady.prepare(model, batch, budget=Budget(PEAK, minimum + 100), policy="dynamic-random")
    before = (tuner.selection, tuner.plan, tuner._draws.moment, str(tuner.state_dict()["meta"]))
    optimizer = adam(tuner)
    with pytest.raises(BudgetError, match="below the"):
        tuner.attach(optimizer)
    assert (tuner.selection, tuner.plan, tuner._draws.moment, str(tuner.state_dict()["meta"])) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    drawn = tuner.resample(1)
    assert tuner._decision.spending(tuner._draws.moment).peak(drawn) <= minimum + 100
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    tuner.finish()


def peak_of_minimum(model: nn.Module, batch: Any) -> int:
    decision = Request(budget="peak:1 TiB", policy="dynamic-random").decide(model, batch)
    return decision.minimum_peak(decision.start)


def test_the_plan_of_a_tuner_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(Residual), normal(4, 3, 17, 17)
    tuner = trady.prepare(model, x, budget="2 MiB")
    simulated: list[Simulator] = []
    plain = Simulator.timeline

    def counted(simulator: Simulator, **options: Any) -> Any:
        simulated.append(simulator)
        return plain(simulator, **options)

    monkeypatch.setattr(Simulator, "timeline", counted)
    plan = tuner.plan
    assert simulated
    simulated.clear()
    assert tuner.plan is plan
    assert not simulated
    tuner.resample(1)
    assert tuner.plan is not plan
    assert tuner.plan.selection == tuner.selection
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "GPT-2, loss", "EfficientNet, by hand"])
@pytest.mark.parametrize("budget", ["elements:20000", "peak:1 GiB"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_prepare_traces_the_model_three_times(
    name: str, budget: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = recomputed_model(name, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    traced: list[bool | None] = []
    plain = recorder.trace_forward

    def counted(model: nn.Module, example: Any, *, training: bool | None = None, like: Any = None) -> Any:
        traced.append(training)
        return plain(model, example, training=training, like=like)

    monkeypatch.setattr(model_analysis, "trace_forward", counted)
    tuner = trady.prepare(model, batch, budget=budget)
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    assert len(tuner.plan.selection.channels) > 0
    tuner.finish()
    assert sorted(map(bool, traced)) == [False, True, True]


@pytest.mark.parametrize("name", ["BERT", "Swin", "GPT-2, loss"])
def test_samples_of_an_evaluation_pass_are_those_that_its_own_doubled_trace_shows(name: str) -> None:
    model, batch = recomputed_model(name, torch.float32)
    traces = model_analysis.trace_modes(model, batch)
    training, evaluation = traces.training, traces.evaluation
    assert evaluation is not None
    doubled = [recorder.trace_forward(model, Batch.of(batch).doubled, training=mode) for mode in (True, False)]
    found = carried_over(training, samples_of(training, doubled[0]), evaluation)
    assert found == samples_of(evaluation, doubled[1])
    assert sum(each is not None for each in found) > len(found) // 2


def test_a_batch_is_measured_once_and_keeps_what_it_is() -> None:
    ids, mask = torch.arange(12).view(4, 3), torch.ones(4, 3)
    batch = Batch.of({"ids": ids, "mask": mask, "flag": True})
    assert Batch.of(batch) is batch
    assert (batch.samples, batch.nbytes, batch.elements) == (4, 12 * 8 + 12 * 4, 24)
    assert batch.arguments == ((), batch.inputs)
    assert batch.meta is batch.meta
    assert batch.meta.inputs["mask"].is_meta
    assert batch.meta.inputs["ids"] is ids
    assert batch.doubled.samples == 8
    assert [chunk.samples for chunk, _ in batch.chunks(3)] == [3, 1]
    assert sum(share for _, share in batch.chunks(3)) == 1


class Weights(BudgetScope):
    """A kind of budget in one class: weight elements alone."""

    name, meaning, example, in_bytes = "weights", "weight elements", "weights:500", False

    def prices(self, table: ChannelTable, copies: int) -> tuple[int, int]:
        return 0, 1

    def measuring(self, spending: Spending, selection: Selection, kept: int, table: ChannelTable) -> int:
        return table.weight_elements(selection)


def test_a_kind_of_budget_is_one_class_and_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scopes.SCOPES, "weights", Weights())
    assert str(budgets.parse_budget("weights:500")) == "weights:500"
    model, x = seeded(Residual), normal(4, 3, 17, 17)
    tuner = trady.prepare(model, x, budget="weights:500", policy="dynamic-rgn")
    table = tuner.plan.table
    tuner.observe([(x, torch.zeros(4, dtype=torch.int64))], loss_of_outputs)
    assert 400 < table.weight_elements(tuner.selection) <= 500
    tuner.finish()
    with pytest.raises(BudgetError, match='type budget="weights:'):
        trady.prepare(model, x, budget="weights:1")
    with pytest.raises(BudgetError, match=r'"weights:500" \(weight elements\)'):
        trady.prepare(model, x, budget="much")


def loss_of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)
