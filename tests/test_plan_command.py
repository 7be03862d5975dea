"""``trady plan``: what it shows, what it predicts, models without weights, what it refuses."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import trady
from tests.small_task import small_net
from trady.cli.app import app
from trady.planning.budget import parse_budget
from trady.planning.forecast import SHARES, forecast, sweep
from trady.planning.request import Request
from trady.training.models.from_config import read_tokens, skeleton, token_batch

hf = pytest.importorskip("transformers")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}
TOKENS = ("--tokens", "4x32")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a configuration, and no weights."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "120", "NO_COLOR": "1"})


def shown(*arguments: object) -> str:
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def figures(*arguments: object) -> Any:
    return json.loads(shown(*arguments, "--json"))


def refused(*arguments: object) -> str:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def batch(sequences: int = 4, length: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 500, (sequences, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def real_llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, use_cache=False))


# -- what is shown ----------------------------------------------------------------------------------------------


def test_a_plan_says_what_trains_what_is_kept_and_what_is_computed_anew(llama: Path) -> None:
    text = shown(llama, *TOKENS, "--budget", "4 MiB")
    for word in (
        "LlamaForCausalLM: trady in peak:4 MiB",
        "input channels",
        "draws from",
        "of the channels that train",
        "segments of the forward pass",
        "of a forward pass",
        "minimum budget",
        "Predicted peak of a step",
        "weights",
        "saved activations",
        "temporaries",
        "model.layers.0.self_attn.q_proj",
    ):
        assert word in text, word


def test_the_parts_of_a_predicted_peak_sum_up_to_it_and_the_least_budget_is_the_least(llama: Path) -> None:
    plan = figures(llama, *TOKENS, "--budget", "4 MiB")
    assert sum(plan["predicted_parts"].values()) == plan["predicted_peak_bytes"] <= parse_budget("4 MiB").amount
    least = plan["least_budget_bytes"]
    assert least <= plan["least_peak_bytes"]
    assert figures(llama, *TOKENS, "--budget", f"{least} B")["predicted_peak_bytes"] <= least
    assert "below the minimum" in refused(llama, *TOKENS, "--budget", f"{least - 1} B")


@pytest.mark.parametrize("budget", ["update:20 KiB", "elements:3000"])
def test_the_peak_is_predicted_under_every_kind_of_budget(llama: Path, budget: str) -> None:
    plan = figures(llama, *TOKENS, "--budget", budget)
    assert plan["predicted_peak_bytes"] == sum(plan["predicted_parts"].values()) > 0


def test_a_written_plan_is_the_printed_one_and_can_be_prepared(llama: Path, tmp_path: Path) -> None:
    printed = figures(llama, *TOKENS, "--budget", "4 MiB", "--out", tmp_path / "plan.json", "--curve")
    assert json.loads((tmp_path / "plan.json").read_text()) == printed
    plan = trady.Plan.load(tmp_path / "plan.json")
    tuner = trady.prepare(real_llama(), batch(), plan=plan)
    assert tuner.selection == plan.selection
    tuner.finish()


def test_a_curve_shows_the_peak_from_no_channel_to_all_of_them(llama: Path) -> None:
    curve = figures(llama, *TOKENS, "--budget", "2 MiB", "--curve")["curve"]
    assert [point["share"] for point in curve] == list(SHARES)
    for peak in ("channels", "kept_peak_bytes", "recomputed_peak_bytes"):
        assert [point[peak] for point in curve] == sorted(point[peak] for point in curve)
    assert all(point["recomputed_peak_bytes"] < point["kept_peak_bytes"] for point in curve if point["share"])
    text = shown(llama, *TOKENS, "--budget", "2 MiB", "--curve")
    assert "all recomputed" in text
    assert text.count("◆") == len(SHARES) + 1


def test_a_model_with_nothing_to_compute_anew_has_one_curve() -> None:
    text = shown("tests.small_task:small_net", "--image-size", 12, "--budget", "1 MiB", "--classes", 3, "--curve")
    assert "all recomputed" not in text
    assert "segments" not in text
    assert "always trained" in text
    assert "◆" not in text, "the budget lies beyond the last bar"


def test_the_curve_of_a_network_with_a_head_begins_where_that_alone_trains() -> None:
    options = ("tests.small_task:small_net", "--image-size", 12, "--classes", 3, "--budget", "1 MiB", "--curve")
    curve = figures(*options)["curve"]
    assert [point["share"] for point in curve] == list(SHARES)
    assert curve[0]["channels"] == 0 < curve[0]["kept_peak_bytes"] <= curve[1]["kept_peak_bytes"]


def test_a_sweep_is_a_plan_for_every_budget_and_batch_size(llama: Path, tmp_path: Path) -> None:
    options = (llama, "--tokens", "4x32", "--sweep", "1 MiB,update:20 KiB", "--batch-sizes", "2,4")
    found = figures(*options, "--out", tmp_path / "sweep.json")
    assert found == json.loads((tmp_path / "sweep.json").read_text())
    cells = {(cell["budget"], cell["batch_size"]): cell for cell in found["cells"]}
    assert set(cells) == {(b, n) for b in ("peak:1 MiB", "update:20 KiB") for n in (2, 4)}
    for (budget, size), cell in cells.items():
        if not cell["possible"]:
            assert budget == "peak:1 MiB"
            with pytest.raises(trady.BudgetError, match="below the minimum"):
                trady.plan(real_llama(), batch(size), budget=budget)
            assert trady.plan(real_llama(), batch(size), budget=cell["predicted_peak_bytes"])
            continue
        plan = trady.plan(real_llama(), batch(size), budget=budget)
        assert (cell["channels"], cell["recomputed_share"]) == (plan.cost.channels, plan.recomputed_share)
        assert plan.predicted_peak_bytes in (None, cell["predicted_peak_bytes"])
    text = shown(llama, *TOKENS, "--sweep", "1 MiB")
    assert "impossible" in text
    assert "4 × 32 tokens" in text


def test_numbers_with_thousands_are_one_budget_of_a_sweep() -> None:
    options = ("tests.small_task:small_net", "--image-size", 12, "--classes", 3, "--batch-size", 4)
    cells = figures(*options, "--sweep", "elements:2,000, elements:4000")["cells"]
    assert [cell["budget"] for cell in cells] == ["elements:2000", "elements:4000"]


# -- what is predicted ------------------------------------------------------------------------------------------


def test_a_model_without_weights_has_the_plan_and_the_measured_peak_of_the_model_with_them(llama: Path) -> None:
    found = skeleton(str(llama / "config.json"), 1, tokens=True, length=32, dtype=None)
    assert all(parameter.is_meta for parameter in found.model.parameters())
    example = token_batch(found, 4, 32, seed=0)
    hollow = trady.plan(found.model, example, budget="4 MiB")
    model = real_llama()
    tuner = trady.prepare(model, batch(), budget="4 MiB")
    assert tuner.plan.to_json() == hollow.to_json()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))

    def step() -> None:
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ledger = tuner.ledger(step, inference=False)
    assert hollow.predicted_peak_bytes is not None
    assert abs(ledger.peak_bytes - hollow.predicted_peak_bytes) < 0.02 * ledger.peak_bytes
    assert ledger.parts["weights"] == hollow.predicted_parts["weights"]
    assert ledger.parts["compact parameters"] == hollow.predicted_parts["compact parameters"]
    assert (
        abs(ledger.parts["saved activations"] - hollow.predicted_parts["saved activations"]) < 0.1 * ledger.peak_bytes
    )
    tuner.finish()


def test_half_the_bits_are_half_the_weights(llama: Path) -> None:
    whole = figures(llama, *TOKENS, "--budget", "update:20 KiB")
    half = figures(llama, *TOKENS, "--budget", "update:20 KiB", "--dtype", "bfloat16")
    assert half["element_bytes"] * 2 == whole["element_bytes"]
    assert half["predicted_parts"]["weights"] < 0.51 * whole["predicted_parts"]["weights"]


@pytest.mark.parametrize(
    ("architecture", "changes", "options"),
    [
        ("GPT2LMHeadModel", {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 500}, TOKENS),
        ("LlamaForSequenceClassification", LLAMA, TOKENS),
        ("BertModel", {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "intermediate_size": 128, "vocab_size": 500}, TOKENS),
        ("ViTForImageClassification", {"model_type": "vit", "hidden_size": 48, "num_hidden_layers": 2, "image_size": 32,
                                       "num_attention_heads": 2, "intermediate_size": 96, "patch_size": 8},
         ("--batch-size", 4)),
    ],
)  # fmt: skip
def test_the_architecture_decides_what_is_built(
    tmp_path: Path, architecture: str, changes: dict[str, Any], options: tuple[Any, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**changes, "architectures": [architecture]}))
    plan = figures(tmp_path, *options, "--budget", "update:20 KiB", "--classes", 3)
    built = "BertForSequenceClassification" if architecture == "BertModel" else architecture
    assert plan["model"] == built
    assert plan["predicted_peak_bytes"] > 0


def test_recompute_none_keeps_everything_and_all_nothing(llama: Path) -> None:
    kept, auto, anew = (
        figures(llama, *TOKENS, "--budget", "20 MiB", "--recompute", mode) for mode in ("none", "auto", "all")
    )
    assert kept["recomputed"] == auto["recomputed"] == []
    assert len(anew["recomputed"]) == anew["recomputable"] > 0
    assert anew["predicted_peak_bytes"] < kept["predicted_peak_bytes"]


def test_a_forecast_of_a_micro_batch_counts_the_whole_batch_among_the_inputs() -> None:
    request = Request(budget="peak:1 MiB", policy="dynamic-random", micro_batch=4)
    images = torch.zeros(16, 3, 12, 12)
    found = forecast(small_net(), images, request).plan
    assert (found.micro_batch, found.table.batch) == (4, 4)
    assert found.predicted_parts["inputs"] == images.nbytes
    whole = forecast(small_net(), images, replace(request, micro_batch=None)).plan
    assert whole.micro_batch is None
    cells = sweep(small_net(), replace(request, micro_batch="auto"), ["150 KiB"], [(16, images)])
    assert cells[0].possible
    assert cells[0].micro_batch in (8, 4, 2, 1)


# -- what is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_planned_is_refused_with_what_to_type(llama: Path) -> None:
    budget = ("--budget", "4 MiB")
    assert "--tokens BATCHxLENGTH" in refused(llama, *budget)
    assert "e.g. 4x1024" in refused(llama, *budget, "--tokens", "4 by 32")
    assert "at most 64 tokens" in refused(llama, *budget, "--tokens", "4x65")
    assert "float32, bfloat16, float16" in refused(llama, *budget, *TOKENS, "--dtype", "int8")
    assert "auto, all, none" in refused(llama, *budget, *TOKENS, "--recompute", "some")
    assert "nor auto" in refused(llama, *budget, *TOKENS, "--micro-batch", "many")
    assert "--sweep" in refused(llama, *TOKENS, *budget, "--sweep", "4 MiB")
    assert "8,16,32" in refused(llama, *TOKENS, "--sweep", "4 MiB", "--batch-sizes", "8;16")
    assert "takes images" in refused("efficientnet-lite0", *budget, *TOKENS)
    (llama / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    )
    assert "not --tokens" in refused(llama, *budget, *TOKENS)
    assert read_tokens(" 2 X 8 ") == (2, 8)


def test_a_budget_below_the_least_says_what_less_would_take(llama: Path) -> None:
    line = refused(llama, *TOKENS, "--budget", "100 KiB")
    assert all(f"with {n} sample" in line for n in (2, 1))
    assert "in bfloat16" in line
    for amount, options in (
        (line.split(" with 2 samples")[0].rpartition(", ")[2].rpartition(": ")[2], ("--tokens", "2x32")),
        (line.split(" in bfloat16")[0].rpartition(", ")[2], (*TOKENS, "--dtype", "bfloat16")),
    ):
        assert figures(llama, *options, "--budget", amount)["predicted_peak_bytes"] <= parse_budget(amount).amount
    assert "with --recompute all" in refused(llama, *TOKENS, "--budget", "100 KiB", "--recompute", "none")


# -- batches larger than planned --------------------------------------------------------------------------------


def test_a_batch_larger_than_the_example_warns_once() -> None:
    tuner = trady.prepare(small_net(), torch.zeros(8, 3, 12, 12), budget="update:12 KiB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.model(torch.zeros(8, 3, 12, 12))
        tuner.model(torch.zeros(3, 3, 12, 12))
        with torch.no_grad():
            tuner.model(torch.zeros(64, 3, 12, 12))
        copy.deepcopy(tuner.model)(torch.zeros(64, 3, 12, 12))
    before = tuner.selection.count
    with pytest.warns(trady.TradyWarning, match="is not covered by the one that was planned for"):
        tuner.model(torch.zeros(12, 3, 12, 12))
    assert tuner.selection.count < before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.model(torch.zeros(16, 3, 12, 12))
    model = tuner.finish()
    assert not model._forward_pre_hooks


def test_a_plan_in_elements_does_not_depend_on_the_batch() -> None:
    tuner = trady.prepare(small_net(), torch.zeros(2, 3, 12, 12), budget="elements:2000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.model(torch.zeros(9, 3, 12, 12))
    tuner.finish()
