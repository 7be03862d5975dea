"""The methods that the benchmarks compare train what they say."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trady
from benchmarks import compiled, memory
from benchmarks.gradients import gradient_errors
from benchmarks.methods import METHODS, TITLES
from benchmarks.shares import ShareOfEveryLayer, budget_of
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError, Task, needs
from benchmarks.workloads import MIB, WORKLOADS
from tests.models import relative_error
from tests.small_workloads import SMALL, TOY, small, toy_task
from trady.policies import get_policy


@pytest.mark.parametrize("share", [Fraction(1, 64), Fraction(1, 4), Fraction(1)])
def test_share_of_every_layer_draws_that_share_and_at_least_one_channel(share: Fraction) -> None:
    task, policy = toy_task(), ShareOfEveryLayer(share)
    budget = budget_of(policy, task.model, task.batch)
    first, again, other = (
        trady.plan(task.model, task.batch, policy=policy, budget=budget, seed=seed) for seed in (0, 0, 1)
    )
    assert {name: len(drawn) for name, drawn in first.selection.items()} == {
        made.name: max(1, round(share * made.channels)) for made in first.table
    }
    assert first.selection == again.selection
    assert (first.selection == other.selection) is (share == 1)
    assert budget == f"elements:{first.cost.elements}"


@pytest.mark.parametrize("share", [Fraction(0), Fraction(3, 2)])
def test_share_that_is_none_is_refused(share: Fraction) -> None:
    with pytest.raises(ValueError, match="above 0 and at most at 1"):
        ShareOfEveryLayer(share)


def test_share_drawn_once_stays_in_every_epoch() -> None:
    task = toy_task()
    for once in (False, True):
        policy = ShareOfEveryLayer(Fraction(1, 4), once=once)
        tuner = trady.prepare(task.model, task.batch, policy=policy, budget=budget_of(policy, task.model, task.batch))
        first = tuner.selection
        assert (tuner.resample(1) == first) is once
        tuner.finish()


def test_workloads_are_those_that_the_claims_are_about() -> None:
    assert set(WORKLOADS) == set(SMALL)
    transformers = ("minilm", "gpt2-small-like", "vit-tiny", "swin-tiny", "llama-tiny")
    assert {name: (w.policy, w.static_policy, w.budget) for name, w in WORKLOADS.items()} == {
        "resnet50": ("share-1/64", "static-share-1/64", None),
        "effnet": ("share-3/100", "static-share-3/100", None),
        "mobilenetv2": ("share-3/100", "static-share-3/100", None),
        "mbv2-w0.35": ("trady", "static-random", "elements:27946"),
        "mcunet-5fps": ("trady", "static-random", "elements:27946"),
        **dict.fromkeys(transformers, ("share-1/50", "static-share-1/50", None)),
    }
    assert all(get_policy(p).name == p for w in WORKLOADS.values() for p in (w.policy, w.static_policy))
    assert WORKLOADS["resnet50"].bars.saved_bytes == 40 * MIB
    assert list(METHODS) == list(TITLES)


def test_bars_are_those_of_the_kind() -> None:
    for workload in WORKLOADS.values():
        bars = workload.bars
        held = (bars.peak_over_inference, bars.below_peers, bars.gradient_error)
        times = (bars.step_over_full, bars.step_over_floor)
        if workload.kind == "cnn":
            assert (held, times) == ((1.0, False, None), (0.5, 1.0))
        else:
            assert (held, times) == ((2.0, True, 1e-4), (0.7, 1.15))
            assert bars.peak_aim == 1.6


# The fixture's backbone stands for both.
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "mcunet-5fps"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_workload_steps_with_every_method(name: str, method: str, models: Path) -> None:
    if method.startswith("lora"):
        pytest.importorskip("peft")
    if method == "galore":
        pytest.importorskip("galore_torch")
    workload = small(name)
    none = {
        "head": {"gpt2-small-like": "tied to the embedding"},
        "bitfit": {"llama-tiny": "no bias"},
        "galore": {name: "none but its head" for name, w in WORKLOADS.items() if w.kind == "cnn"},
        "trady-keep": {name: "recomputed" for name, w in WORKLOADS.items() if w.kind == "cnn"},
    }
    task = workload.make(models)
    if name in none.get(method, {}):
        with pytest.raises(SkippedError, match=none[method][name]), METHODS[method](workload, task):
            pass
        return
    with METHODS[method](workload, task) as step:
        step.run()
        assert (step.trainable_parameters == 0) is (method == "floor")
        if method not in ("trady", "trady-keep", "static-random"):
            assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_layers_that_a_compiler_takes_whole_have_tradys_gradients() -> None:
    workload = small("llama-tiny")
    compiled.compiled_layers(workload, workload.make(Path()), backend="aot_eager")()
    task = workload.make(Path())
    tuner = workload.arm(task)
    task.model.train()
    task.run().backward()
    gradients = {name: p.grad for name, p in tuner.named_parameters() if name.endswith(".channels")}
    expected = [gradients[f"{tuner.plan.table[name].parameter}.channels"] for name in tuner.selection]
    tuner.finish()
    assert sorted(compiled.GRADIENTS) == list(range(len(expected)))
    for layer, gradient in enumerate(expected):
        assert relative_error(compiled.GRADIENTS[layer], gradient) < 1e-5, layer
    torch.compiler.reset()


def test_only_models_of_linear_layers_are_compiled_layer_by_layer() -> None:
    workload = small("resnet50")
    with pytest.raises(SkippedError, match="linear layers"):
        compiled.compiled_layers(workload, workload.make(Path()), backend="eager")


@pytest.mark.parametrize("name", ["gpt2-small-like", "vit-tiny"])
def test_text_and_images_are_the_same_every_time_and_dropout_is_off(name: str) -> None:
    first, again = small(name).make(Path()), small(name).make(Path())
    assert torch.equal(first.run(), again.run())
    assert not first.model.training or torch.equal(first.run(), first.run())
    assert not any(module.p for module in first.model.modules() if isinstance(module, nn.Dropout))


def test_floor_of_a_text_model_computes_the_gradient_of_its_embedding() -> None:
    workload = small("llama-tiny")
    task = workload.make(Path())
    seen = []
    with METHODS["floor"](workload, task) as step:

        def watch(module: nn.Module, given: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: seen.append(gradient.shape))

        model: Any = task.model
        model.get_input_embeddings().register_forward_hook(watch)
        step.run()
    assert seen == [(2, 8, 64)]


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_what_it_says(method: str) -> None:
    if method.startswith("lora"):
        pytest.importorskip("peft")
    task = toy_task()
    if method in ("galore", "trady-keep"):
        with pytest.raises(SkippedError, match=r"none but its head|recomputed"), METHODS[method](TOY, task):
            pass
        return
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with METHODS[method](TOY, task) as step:
        step.run()
        trained = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
        if method not in ("trady", "static-random"):
            assert step.trainable_parameters == trained
    after = task.model.state_dict()
    # An adapter moves the weight of its layer under another name.
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items() if "lora_" not in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    head = {"classifier.weight", "classifier.bias"}
    if method in ("full", "checkpoint"):
        assert {"features.0.weight", "features.3.weight", "classifier.weight"} <= changed
        assert any("running" in name for name in changed)
    elif method == "floor":
        assert not changed
    elif method == "bitfit":
        assert changed == {"features.1.bias", "features.4.bias", "classifier.bias"}
    else:
        assert head <= changed
        assert not any("running" in name for name in changed)
        assert (changed == head) is (method == "head" or method.startswith("lora"))


def test_lora_targets_linear_layers_and_in_a_cnn_convolutions_without_groups() -> None:
    pytest.importorskip("peft")
    for name, targets in (
        ("mobilenetv2", "35 convolution layers, and the head"),
        ("effnet", "32 convolution layers, and the head"),
        ("vit-tiny", "6 linear layers, and the head"),
        ("gpt2-small-like", "4 Conv1D layers"),
        ("llama-tiny", "7 linear layers"),
    ):
        workload = small(name)
        with METHODS["lora"](workload, workload.make(Path())) as step:
            assert step.note == f"rank 8 on {targets}"


def test_checkpointing_computes_the_same_gradients_and_keeps_less() -> None:
    workload = small("mobilenetv2")
    steps, saved = {}, {}
    for method in ("full", "checkpoint"):
        task = workload.make(Path())
        with METHODS[method](workload, task) as step:
            saved[method] = step.ledger().saved_bytes
            task.run().backward()
            steps[method] = [parameter.grad for parameter in task.model.parameters()]
    for plain, recomputed in zip(*steps.values(), strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-3, atol=1e-5)
    assert saved["checkpoint"] < saved["full"] / 2


def test_galore_projects_linear_weights_to_a_rank_below_their_smallest_dimension() -> None:
    pytest.importorskip("galore_torch")
    from benchmarks.galore import galore_optimizer

    task = small("gpt2-small-like").make(Path())
    optimizer, note = galore_optimizer(task.model, 1e-3)
    plain, *projected = optimizer.param_groups
    assert "rank" not in plain
    assert [(group["rank"], len(group["params"])) for group in projected] == [(32, 4)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(task.model.parameters()))
    assert "4 linear weights projected to ranks 32" in note


def test_missing_package_says_what_to_type() -> None:
    with pytest.raises(MissingPackageError, match=r'pip install "trady\[benchmarks\]"'):
        needs("no_such_package_at_all", "benchmarks")


def test_method_without_its_package_is_left_out_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str, extra: str) -> None:
        raise MissingPackageError(f"{package} cannot be imported")

    monkeypatch.setattr("trady.estimates.adapters.needs", missing)
    measured = memory.measure(TOY, Path(), methods=("head", "lora"))
    assert [row.method for row in measured.rows] == ["head"]
    assert measured.skipped == {"lora": "peft cannot be imported"}
    assert any("LoRA is left out: peft" in remark for remark in memory.remarks(measured))


def test_gradient_error_is_nothing_for_the_same_batch_and_plain_for_another() -> None:
    made = []

    def same(models: Path) -> Task:
        made.append(toy_task())
        vars(made[-1].model.get_submodule("dropout"))["p"] = 0.0
        return made[-1]

    def another(models: Path) -> Task:
        task = same(models)
        return task if len(made) % 2 else replace(task, batch=task.batch * 0.9)

    errors = gradient_errors(replace(TOY, make=same), Path())
    assert len(made) == 2
    assert errors
    assert max(errors.values()) < 1e-4
    assert max(gradient_errors(replace(TOY, make=another), Path()).values()) > 1e-2
