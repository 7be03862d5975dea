"""The benchmarks measure what they say: on networks small enough to know the answer."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trady
from benchmarks import memory, options, sparsity, speed
from benchmarks.backbones import Backbone, load_backbone, load_images, top1
from benchmarks.methods import METHODS, TITLES
from benchmarks.shares import ShareOfEveryLayer, budget_of
from benchmarks.workloads import MIB, WORKLOADS, Bars, Task, Workload
from tests.small_task import pixels, small_net
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
    return Task(
        small_net(), torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous(), torch.from_numpy(labels)
    )


TOY = Workload("toy", "two convolutions", toy_task, "trady", "elements:2000")


@pytest.mark.parametrize("share", [Fraction(1, 64), Fraction(1, 4), Fraction(1)])
def test_share_of_every_layer_draws_that_share_and_at_least_one_channel(share: Fraction) -> None:
    task, policy = toy_task(), ShareOfEveryLayer(share)
    budget = budget_of(policy, task.model, task.images)
    first, again, other = (
        trady.plan(task.model, task.images, policy=policy, budget=budget, seed=seed) for seed in (0, 0, 1)
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


def test_workloads_are_those_that_the_claims_are_about() -> None:
    assert list(WORKLOADS) == ["resnet50", "effnet", "mbv2-w0.35", "mcunet-5fps"]
    assert {name: (w.policy, w.budget) for name, w in WORKLOADS.items()} == {
        "resnet50": ("share-1/64", None),
        "effnet": ("share-3/100", None),
        "mbv2-w0.35": ("trady", "elements:27946"),
        "mcunet-5fps": ("trady", "elements:27946"),
    }
    assert all(get_policy(w.policy).name == w.policy for w in WORKLOADS.values())
    assert all(w.bars.peak_over_inference == 1.0 for w in WORKLOADS.values())
    assert WORKLOADS["resnet50"].bars.saved_bytes == 40 * MIB
    assert list(METHODS) == list(TITLES)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_what_it_says(method: str) -> None:
    task = toy_task()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with METHODS[method](TOY, task) as step:
        step.run()
    after = task.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "full":
        assert {"features.0.weight", "features.3.weight", "classifier.weight"} <= changed
        assert any("running" in name for name in changed)
    elif method == "floor":
        assert not changed
    else:
        assert {"classifier.weight", "classifier.bias"} <= changed
        assert not any("running" in name for name in changed)
        assert (changed == {"classifier.weight", "classifier.bias"}) is (method == "head")


def test_memory_of_a_toy_workload_is_what_its_layers_keep() -> None:
    rows = {(row.method, row.seed): row for row in memory.measure(TOY, Path(), draws=2)}
    assert set(rows) == {("full", 0), ("head", 0), ("trady", 0), ("trady", 1)}
    assert len({row.inference_peak_bytes for row in rows.values()}) == 1
    full, head, drawn = rows["full", 0], rows["head", 0], rows["trady", 0]
    # Full fine-tuning keeps at least the input of both convolutions and of both normalisations.
    maps = 4 * 8 * 32 * 32 * (3 + 8 + 8) + 4 * 8 * 16 * 16 * 16
    assert full.saved_bytes > maps
    assert head.saved_bytes < full.saved_bytes / 100
    assert 0 < drawn.channel_bytes <= drawn.saved_bytes < full.saved_bytes / 3
    assert drawn.peak_bytes < full.peak_bytes
    assert drawn.ratio == drawn.peak_bytes / drawn.inference_peak_bytes


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


@pytest.mark.parametrize(("bar", "code"), [(100.0, 0), (1e-3, 1)])
def test_memory_command_exits_1_when_a_bar_is_missed(bar: float, code: int, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(memory, "WORKLOADS", {"toy": replace(TOY, bars=Bars(bar))})
    target = tmp_path / "memory.json"
    assert memory.run(["--workload", "toy", "--draws", "1", "--json", str(target)]) == code
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
    monkeypatch.setattr(speed, "WORKLOADS", {"toy": TOY})
    monkeypatch.setattr(speed, "AIMS", {"full": 1e-9, "floor": 1e9})
    target = tmp_path / "speed.json"
    assert speed.run(["--workload", "toy", "--repeats", "2", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["workloads"]["toy"]
    assert {method: len(times) for method, times in figures["seconds"].items()} == dict.fromkeys(METHODS, 2)
    assert {over: aim["met"] for over, aim in figures["aims"].items()} == {"full": False, "floor": True}


def test_sparsity_of_a_draw_is_the_plans_and_its_bytes_are_the_ledgers() -> None:
    drawn = list(sparsity.draws(TOY, Path(), range(3)))
    assert [draw.seed for draw in drawn] == [0, 1, 2]
    assert all(draw.planned_channel_bytes == draw.measured_channel_bytes > 0 for draw in drawn)
    plan = trady.plan(toy_task().model, toy_task().images, budget=TOY.budget, seed=2)
    assert drawn[2].activation_sparsity == plan.cost.activation_sparsity
    assert drawn[2].channels == plan.cost.channels


def test_sparsity_faults_name_seed_and_figure() -> None:
    good = sparsity.Draw("all layers", 2, 0, 9, 0.95, 0.98, 0.97, 64, 64, 0.97)
    assert sparsity.faults([good]) == []
    found = sparsity.faults(
        [good, replace(good, seed=4, flops_reduction=0.94), replace(good, measured_channel_bytes=68)]
    )
    assert len(found) == 2
    assert "seed 4: flops_reduction 0.9400" in found[0]
    assert "68 bytes, planned 64" in found[1]


@pytest.mark.parametrize("command", ["memory", "speed", "sparsity", "backbones"])
def test_commands_explain_themselves(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command}", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(options.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "--models" in done.stdout
