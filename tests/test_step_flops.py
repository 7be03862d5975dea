"""What a step takes of full fine-tuning: the count is that of the kernels that run, and draws keep a limit to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import trady
from tests.counted_flops import multiply_adds
from tests.models import Dense, Grouped, PreActivation, Residual, freeze_norms, normal, seeded
from tests.recomputed_models import loss_of, recomputed_model
from tests.small_runs import run
from tests.small_task import StopAfter, small_net, write_npz
from trady.channels.selection import Selection
from trady.cli.app import app
from trady.policies import Scheme, SparseUpdate, policy_names
from trady.policies.evidence import needs_of

CONVOLUTIONAL: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: partial(seeded, kind) for kind in (Residual, Dense, Grouped, PreActivation)
}

#: With plain attention (the counter does not know the CPU's fused one), and without a loss that leaves rows out.
TRANSFORMERS = ("BERT", "Qwen2", "Llama, loss", "ViT", "Swin", "ConvNeXt", "ViT, by hand")


def model_of(name: str) -> tuple[Any, Any]:
    if name in CONVOLUTIONAL:
        return CONVOLUTIONAL[name](), normal(4, 3, 9, 9)
    model, batch = recomputed_model(name, torch.float32)
    if hasattr(model, "config"):
        model.config._attn_implementation = "eager"
    return model, batch


def step_of(model: nn.Module, batch: Any) -> Callable[[], None]:
    loss = loss_of(batch)
    return lambda: loss(model.train()).backward()


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *TRANSFORMERS])
def test_the_count_is_that_of_the_kernels_that_run(name: str) -> None:
    model, batch = model_of(name)
    seen = set()
    for seed in range(3):
        tuner = trady.prepare(model, batch, budget="elements:600", policy="dynamic-random", seed=seed, recompute="none")
        step = step_of(model, batch)
        step()
        found = tuner.plan.step
        assert found is not None
        assert multiply_adds(step) == found.total
        seen.add(found.stops_at)
        tuner.finish()
    assert seen <= {layer.name for layer in tuner.plan.table}


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, "Qwen2", "Swin"])
def test_the_count_of_full_fine_tuning_is_that_of_plain_pytorch(name: str) -> None:
    model, batch = model_of(name)
    found = trady.plan(model, batch, policy="full").step
    freeze_norms(model)
    assert found is not None
    assert multiply_adds(step_of(model, batch)) == found.full


def test_in_front_of_the_first_layer_that_trains_no_gradient_is_computed() -> None:
    """What the backward pass runs, layer by layer from the end: each layer further adds its own gradients alone."""
    model, batch = model_of("ViT, by hand")
    table = trady.plan(model, batch, policy="full").table
    forward = multiply_adds(lambda: model(batch))
    for place, layer in enumerate(table):
        tuner = trady.prepare(model, batch, budget="elements:100000", policy=Given({layer.name: [0]}), recompute="none")
        step = step_of(model, batch)
        step()
        backward = multiply_adds(step) - forward
        later = {behind.name for behind in table.layers[place + 1 :]}
        step_flops = tuner.plan.step
        tuner.finish()
        assert step_flops is not None
        assert step_flops.stops_at == layer.name
        assert step_flops.passed == len(later) + 2, "with that layer and the head"
        assert backward == step_flops.input_gradients + step_flops.weight_gradients
    assert backward < forward // 10, "of the last one, next to nothing"


@pytest.mark.parametrize("name", ["ConvNeXt", "ViT, by hand", "Llama"])
def test_segments_in_front_of_the_stop_are_not_recomputed(name: str) -> None:
    model, batch = model_of(name)
    last = trady.plan(model, batch, policy="full").table.names[-1]
    tuner = trady.prepare(model, batch, budget="elements:100000", policy=Given({last: [0]}), recompute="all")
    step = step_of(model, batch)
    step()
    found, everything = tuner.plan.step, trady.plan(model, batch, policy="full", recompute="all").step
    counted = multiply_adds(step)
    tuner.finish()
    assert found is not None
    assert everything is not None
    without = found.total - found.recomputed
    assert without <= counted <= found.total
    assert found.recomputed <= everything.recomputed / 2


class Given:
    """Trains the channels that it is given."""

    name, uses_ranking, names_layers = "given", False, True

    def __init__(self, channels: dict[str, Any]) -> None:
        self.channels = channels

    def select(self, draw: Any) -> Selection:
        return Selection(self.channels)


# -- a limit --------------------------------------------------------------------------------------------------------


def measured(tuner: trady.Tuner) -> None:
    """Give a policy what it measures."""
    needs = needs_of(tuner._decision.policy)
    if needs and tuner.observation_due:
        x = normal(4, 3, 9, 9)
        tuner.observe([(x, torch.zeros(4, dtype=torch.int64))], nn.functional.cross_entropy)


@pytest.mark.parametrize("budget", ["elements:1500", "peak:1 MiB"])
@pytest.mark.parametrize("policy", [p for p in policy_names() if p not in ("sparse-update",) and "share" not in p])
def test_every_draw_of_every_policy_keeps_a_limit(policy: str, budget: str) -> None:
    x = normal(4, 3, 9, 9)
    limit = 0.75
    tuner = trady.prepare(
        seeded(Residual), x, budget=None if policy == "full" else budget, policy=policy, max_step_flops=limit
    )
    for epoch in range(3):
        measured(tuner)
        tuner.resample(epoch)
        for _ in range(2):
            step = step_of(tuner.model, x)
            step()
            found = tuner._decision.steps.of(tuner.selection, tuner._draws.moment.recomputation)
            assert multiply_adds(step) == found.total <= limit * found.full
            assert policy == "head" or tuner.selection.count
            tuner.redraw()
    free = trady.plan(seeded(Residual), x, policy="full").step
    assert free is not None
    assert free.over_full > limit, "without the limit it would take more"
    tuner.finish()


def test_channels_of_layers_that_are_passed_take_the_room_of_those_left_out() -> None:
    x = normal(4, 3, 9, 9)
    free = trady.plan(seeded(Residual), x, budget="elements:1500", policy="dynamic-random")
    held = trady.plan(seeded(Residual), x, budget="elements:1500", policy="dynamic-random", max_step_flops="60%")
    assert held.step is not None
    assert free.step is not None
    assert held.step.over_full <= 0.6 < free.step.over_full
    assert held.step.passed < free.step.passed
    assert held.cost.elements > 0.9 * free.cost.elements
    assert not held.held, "nothing of it is frozen by hand"


@pytest.mark.parametrize("policy", ["trady", "dynamic-random", "fisher", "velocity"])
@pytest.mark.parametrize("budget", ["elements:9000", "peak:2 MiB"])
def test_of_the_last_layer_fewer_channels_train_where_all_are_too_many(policy: str, budget: str) -> None:
    """Its weight is most of what this network computes."""
    x = normal(4, 3, 12, 12)
    asked: dict[str, Any] = {"budget": budget, "policy": policy, "ranking": "structural"}
    whole = trady.plan(small_net(), x, policy="full").step
    held = trady.plan(small_net(), x, **asked, max_step_flops=0.5)
    assert whole is not None
    assert held.step is not None
    assert list(held.selection) == ["features.3"]
    assert 0.45 < held.step.over_full <= 0.5
    assert 0 < held.step.weight_gradients < whole.weight_gradients / 2


def test_a_plan_that_was_kept_holds_its_limit(tmp_path: Path) -> None:
    x = normal(4, 3, 9, 9)
    plan = trady.plan(seeded(Residual), x, budget="elements:1500", policy="dynamic-random", max_step_flops=0.6)
    plan.save(tmp_path / "plan.json")
    loaded = trady.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    tuner = trady.prepare(seeded(Residual), x, plan=loaded)
    assert tuner.selection == plan.selection
    tuner.finish()


@pytest.mark.parametrize("given", ["0.6 s", "fast", "", "0", "0x", "-1", "nan", float("inf"), 0, -0.5, 60, True, [1]])
def test_what_is_no_share_of_a_step_is_refused(given: Any) -> None:
    with pytest.raises(trady.BudgetError, match=r'type e.g. max_step_flops="0.6x"'):
        trady.plan(small_net(), normal(4, 3, 12, 12), budget="elements:500", max_step_flops=given)


@pytest.mark.parametrize("given", ["0.6x", "0.6", " .6 X", "60 %", 0.6])
def test_a_share_can_be_said_in_several_ways(given: Any) -> None:
    found = trady.plan(small_net(), normal(4, 3, 12, 12), policy="head", max_step_flops=given).step
    assert found is not None
    assert found.limit == pytest.approx(0.6)


@pytest.mark.parametrize("policy", ["trady", "head", "full", "velocity"])
def test_a_limit_below_the_minimum_names_one_that_is_possible(policy: str) -> None:
    x, budget = normal(4, 3, 9, 9), None if policy in ("head", "full") else "elements:1500"
    with pytest.raises(trady.BudgetError, match="below the minimum, a forward pass and the way back to") as refused:
        trady.plan(seeded(Residual), x, budget=budget, policy=policy, max_step_flops=0.2)
    least = str(refused.value).split('type max_step_flops="')[1].split('"')[0]
    found = trady.plan(seeded(Residual), x, budget=budget, policy=policy, max_step_flops=least).step
    assert found is not None
    assert found.over_full <= float(least.removesuffix("x"))


def test_a_policy_that_is_given_its_layers_is_refused_where_they_are_too_early() -> None:
    x = normal(4, 3, 9, 9)
    policy = SparseUpdate(Scheme((0, 3), (1, 1)))
    asked: dict[str, Any] = {"budget": "elements:20000", "policy": policy}
    with pytest.raises(
        trady.PolicyError, match=r"a step that reaches them takes .* or give it later layers"
    ) as refused:
        trady.prepare(seeded(Residual), x, **asked, max_step_flops=0.5)
    least = str(refused.value).split('type max_step_flops="')[1].split('"')[0]
    assert trady.plan(seeded(Residual), x, **asked, max_step_flops=least).selection.count


def test_a_policy_of_ones_own_that_does_not_look_at_the_table_is_refused() -> None:
    class Stubborn(Given):
        names_layers = False

    policy = Stubborn({"stem.0": [0]})
    with pytest.raises(trady.PolicyError, match="not those that are frozen by hand or that max_step_flops leaves out"):
        trady.prepare(seeded(Residual), normal(4, 3, 9, 9), budget="elements:9000", policy=policy, max_step_flops=0.6)


# -- runs and the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["trady", "dynamic-random", "dynamic-rgn"])
def test_a_run_with_a_limit_resumes_exactly(tmp_path: Path, policy: str) -> None:
    settings: dict[str, Any] = {"policy": policy, "epochs": 4, "max_step_flops": "0.8x"}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    expected = run(unbroken, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(broken, progress=StopAfter(2), **settings)
    with pytest.raises(trady.CheckpointError, match="max_step_flops"):
        run(broken, resume=True, **{**settings, "max_step_flops": "0.9x"})
    result = run(broken, resume=True, **settings)
    assert [m.selection_hash for m in result.history] == [m.selection_hash for m in expected.history]
    wanted, got = expected.model.state_dict(), result.model.state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    plan = json.loads((broken / "plan.json").read_text())
    assert plan["step"]["over_full"] <= plan["step"]["limit"] == 0.8


def test_a_state_of_another_limit_is_refused() -> None:
    x = normal(4, 3, 9, 9)
    asked: dict[str, Any] = {"budget": "elements:1500", "policy": "dynamic-random"}
    state = trady.prepare(seeded(Residual), x, **asked, max_step_flops=0.6).state_dict()
    other = trady.prepare(seeded(Residual), x, **asked)
    with pytest.raises(trady.CheckpointError, match=r"max_step_flops=0\.6x"):
        other.load_state_dict(state)
    other.finish()


def test_plain_full_fine_tuning_has_no_limit_to_keep() -> None:
    with pytest.raises(trady.BudgetError, match="leave it out, or take another policy"):
        run(None, policy="full", max_step_flops=0.5)


def test_the_command_line_shows_and_keeps_it(tmp_path: Path) -> None:
    model = "tests.small_task:small_net"
    asked = ["plan", model, "--image-size", "12", "--budget", "elements:900", "--policy", "dynamic-random"]
    shown = CliRunner().invoke(app, [*asked, "--max-step-flops", "0.8x"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "backward stops at" in shown.stdout
    assert "layers are passed" in shown.stdout
    assert "the operations of full fine-tuning; up to 0.8x is allowed" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["step"]
    assert found["stops_at"]
    assert found["passed"] <= found["layers"]
    counts = ("forward", "input_gradients", "weight_gradients", "recomputed")
    assert sum(found[name] for name in counts) / found["full"] == found["over_full"]
    data = write_npz(tmp_path / "data.npz")
    train = ["finetune", model, str(data), "--epochs", "1", "--image-size", "12", "--budget", "elements:900"]
    refused = CliRunner().invoke(app, [*train, "--out", str(tmp_path / "run"), "--max-step-flops", "0.1x"])
    assert refused.exit_code == 2
    assert "below the minimum" in refused.stderr
