"""``trady.fit``: what it tells beforehand is what the ledger finds in the real step; what it cannot tell it says."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from benchmarks.fit.__main__ import measured
from benchmarks.tasks import Task
from tests.fits import installed, ledger_of, llama
from tests.models import PreActivation, Residual
from tests.small_task import small_net
from tests.small_workloads import shown, small, toy_task
from trady.errors import BudgetError, ModelError, TradyError
from trady.estimates.adapters import add_adapters
from trady.estimates.fit import OPTIMIZERS, USUAL
from trady.estimates.heads import blocks_of
from trady.estimates.methods import METHODS, Settings, read_method
from trady.estimates.report import FitReport, MethodFit
from trady.estimates.search import largest_within

pytest.importorskip("transformers")

#: Beside those of LoRA and QLoRA, which need packages that not everybody has.
PLAIN = ("full", "checkpoint", "bitfit", "head", "last-1", "trady")


def asked(task: Task, method: str, **options: Any) -> MethodFit:
    return trady.fit(task.model, task.batch, methods=[method], device="cpu", **options)[method]


#: Every method on a transformer; elsewhere those that find something else there: layers with transposed weights,
#: convolutions, statistics of batches, blocks of blocks.
STEPS = (
    *(("llama-tiny", method) for method in (*METHODS, "last-1", "trady")),
    *(("gpt2-small-like", method) for method in ("full", "lora", "qlora", "qlora-8bit-checkpoint", "bitfit")),
    *(("vit-tiny", method) for method in ("lora-checkpoint", "qlora", "head", "trady")),
    *(("mobilenetv2", method) for method in ("full", "checkpoint", "lora", "bitfit", "head", "qlora", "trady")),
    *(("resnet50", method) for method in ("full", "checkpoint", "last-2")),
)

#: What a step of these has nothing for.
NOTHING = {("llama-tiny", "bitfit"): "no bias", ("mobilenetv2", "qlora"): "no linear layer in front of its head",
           ("llama-tiny", "last-1"): "no blocks"}  # fmt: skip


@pytest.mark.parametrize(("name", "method"), STEPS)
def test_the_peak_is_that_of_the_ledger(name: str, method: str, models: Path) -> None:
    installed(method)
    workload = small(name)
    task = workload.make(models)
    report = trady.fit(task.model, task.batch, methods=[method], blocks=workload.blocks, device="cpu")
    for told in report.rows:
        if (name, method) in NOTHING:
            assert NOTHING[name, method] in str(told.refused)
            continue
        assert told.refused is None
        if not told.trainable_parameters:  # no head, and in the smallest budget no room for what is drawn first
            assert (method, told.channels) == ("trady", 0)
            continue
        found = measured(workload, workload.make(models), told)
        # Fake batch normalisation in evaluation mode keeps statistics that the real one does not: much in a small step.
        close = 0.03 if method == "trady" else 0.012 if name == "mobilenetv2" else 0.001
        assert told.peak_bytes == pytest.approx(found.peak_bytes, rel=close, abs=1024)
        assert sum(told.parts.values()) == pytest.approx(told.peak_bytes, abs=64)


@pytest.mark.parametrize("method", ["full", "lora", "lora-checkpoint", "qlora"])
def test_the_peak_is_that_of_the_ledger_in_half_precision(method: str) -> None:
    installed(method)
    told = asked(llama(torch.bfloat16), method, rank=4, targets=("q_proj", "v_proj"))
    found = ledger_of(llama(torch.bfloat16), method, rank=4, targets=("q_proj", "v_proj"))
    assert told.peak_bytes == pytest.approx(found.peak_bytes, rel=0.005)


def test_a_dtype_that_the_model_does_not_have_is_that_of_the_step() -> None:
    told = asked(llama(), "full", dtype="bfloat16")
    assert told.peak_bytes == pytest.approx(ledger_of(llama(torch.bfloat16), "full").peak_bytes, rel=0.005)


@pytest.mark.parametrize("method", ["full", "head"])
def test_the_peak_under_autocast_is_that_of_the_ledger(method: str) -> None:
    def task() -> Task:
        made = toy_task()
        return Task(made.model, made.batch, made.loss)

    told = asked(task(), method, autocast="bfloat16")
    made = task()
    read_method(method).apply(made.model, Settings())
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = made.model(made.batch)
        loss = made.loss(output.float())
        del output
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    found = trady.measure(step, made.model, inference=False)
    assert told.peak_bytes == pytest.approx(found.peak_bytes, rel=0.03)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_the_optimizer_takes_is_that_of_the_ledger(optimizer: str) -> None:
    def wide() -> Task:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 8))
        return Task(model, torch.randn(4, 64), lambda output: F.cross_entropy(output, torch.arange(4)))

    told = asked(wide(), "full", optimizer=optimizer)
    found = ledger_of(wide(), "full", optimizer)
    assert told.peak_bytes == pytest.approx(found.peak_bytes, rel=0.03)
    assert told.parts.get("optimizer state", 0) == pytest.approx(found.optimizer_state_bytes, rel=0.03, abs=64)


def test_an_optimizer_of_ones_own_is_measured() -> None:
    mine = asked(toy_task(), "full", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    assert mine == asked(toy_task(), "full", optimizer="sgd-momentum")


def test_steps_over_all_parameters_at_once_take_more() -> None:
    one, all_ = (
        trady.fit(llama().model, llama().batch, methods=["checkpoint"], device=kind) for kind in ("cpu", "cuda")
    )
    assert (one.device, all_.device) == ("cpu", "cuda")
    assert one["checkpoint"].peak_bytes <= all_["checkpoint"].peak_bytes


def test_evaluation_is_a_pass_without_gradients_beside_the_optimizers_state() -> None:
    told, task = asked(llama(), "full"), llama()
    ledger = trady.measure(lambda: task.run().backward(), task.model)
    state = told.parts["optimizer state"]
    assert ledger.inference_peak_bytes is not None
    assert told.evaluation_bytes - state == pytest.approx(ledger.inference_peak_bytes, rel=0.005)


# What fits


@pytest.mark.parametrize("method", ["full", "lora-checkpoint"])
def test_what_is_found_fits_and_one_more_does_not(method: str) -> None:
    installed(method)
    task, memory = llama(), 6 * 2**20
    report = trady.fit(task.model, task.batch, methods=[method], memory=memory, device="cpu")
    for row in [row for row in report.rows if row.largest_batch is not None]:
        assert row.largest_batch
        assert row.longest_sequence

        def peak(batch_size: int, length: int, title: str = row.title) -> int:
            again = trady.fit(
                task.model, task.batch, methods=[method], batch_size=batch_size, length=length, device="cpu"
            )
            return next(each.budget_bytes or each.peak_bytes for each in again.rows if each.title == title)

        assert peak(row.largest_batch, 24) <= memory < peak(row.largest_batch + 1, 24)
        if row.longest_sequence < 64:
            assert peak(4, row.longest_sequence) <= memory < peak(4, row.longest_sequence + 1)


@pytest.mark.parametrize("seed", range(30))
def test_the_search_finds_what_trying_everything_finds(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.rand(4, generator=random) * torch.tensor([1e5, 1e4, 1e5, 2e4])).tolist()
    limit, tried = int(1e7 * float(torch.rand((), generator=random)) ** 2), []

    def peak(number: int) -> int:
        tried.append(number)
        return int(max(a + b * number, c + d * number))

    found = largest_within(peak, limit, start=8, most=300)
    assert found == max((n for n in range(1, 301) if max(a + b * n, c + d * n) <= limit), default=0)
    assert len(tried) <= 12
    assert len(set(tried)) == len(tried)


def test_memory_that_the_weights_do_not_fit_in_is_answered_with_what_takes_least() -> None:
    report = trady.fit(llama().model, llama().batch, methods=["full", "checkpoint"], memory="200 KiB", device="cpu")
    assert [report.fits(row) for row in report.rows] == [False, False]
    assert [row.largest_batch for row in report.rows] == [0, 0]
    assert report.advice is not None
    assert "The weights alone take" in report.advice
    assert "Not even one sample fits" in report.advice
    assert report.advice in " ".join(shown(report).split())


def test_a_batch_that_is_too_large_is_answered_with_one_that_fits() -> None:
    least = asked(llama(batch=1), "checkpoint").peak_bytes
    report = trady.fit(
        llama().model, llama().batch, methods=["full", "checkpoint"], memory=least + 1000, batch_size=400, device="cpu"
    )
    assert report.advice is not None
    assert f"fits with a batch of {report['checkpoint'].largest_batch}" in report.advice
    assert trady.fit(llama().model, llama().batch, methods=["full"], memory="1 GiB").advice is None


# What is refused


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    task = llama()
    for options, error, said in (
        ({"methods": ["lore"]}, ModelError, "no method 'lore'; there are full, checkpoint"),
        ({"memory": "much"}, BudgetError, "much"),
        ({"memory": "update:1 MiB"}, BudgetError, "what a whole step may take"),
        ({"optimizer": "lion"}, ModelError, "no optimizer 'lion'; there are sgd"),
        ({"device": "tpu"}, ModelError, "type one of cpu, cuda"),
        ({"dtype": "float8"}, ModelError, "no dtype 'float8'"),
        ({"rank": 0}, ModelError, "at least 1"),
        ({"batch_size": 0}, ModelError, "batch_size is 0"),
    ):
        with pytest.raises(error, match=said):
            trady.fit(task.model, task.batch, **options)
    with pytest.raises(ModelError, match="needs an example batch"):
        trady.fit(task.model)
    with pytest.raises(ModelError, match="batches with token ids"):
        trady.fit(small_net(), torch.zeros(2, 3, 8, 8), length=9)


def test_targets_that_match_nothing_name_those_that_there_are() -> None:
    pytest.importorskip("peft")
    told = asked(llama(), "lora", targets=("q_proj", "query"))
    assert told.refused is not None
    assert "no layer is called 'query'" in told.refused
    assert "q_proj, k_proj, v_proj" in told.refused


def test_a_method_that_a_network_has_nothing_for_leaves_the_others() -> None:
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    report = trady.fit(model, torch.zeros(2, 6), methods=["bitfit", "last-1", "full"])
    assert [row.refused is None for row in report.rows] == [False, False, True]
    assert "no bias" in str(report["bitfit"].refused)
    assert "no blocks" in str(report["last-1"].refused)


def test_a_package_that_is_missing_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    report = trady.fit(llama().model, llama().batch, methods=["lora", "full"])
    assert "pip install" in str(report["lora"].refused)
    assert report["full"].peak_bytes > 0


def test_a_model_that_does_not_run_on_its_batch_is_refused_before_anything() -> None:
    with pytest.raises(ModelError, match="cannot be traced on the example batch"):
        trady.fit(small_net(), torch.zeros(2, 5, 8, 8))


def test_a_model_that_is_quantised_already_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    from trady.estimates.quantized_base import quantize_base

    task = llama()
    quantize_base(task.model, 4)
    with pytest.raises(ModelError, match="before it was"):
        trady.fit(task.model, task.batch)


# What is left, and what is read


def test_the_model_and_its_batch_stay_as_they_are() -> None:
    task = llama()
    before, keys = copy.deepcopy(task.model.state_dict()), list(task.model.state_dict())
    flags = [parameter.requires_grad for parameter in task.model.parameters()]
    random = torch.get_rng_state()
    trady.fit(task.model, task.batch, methods=PLAIN)
    assert list(task.model.state_dict()) == keys
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())
    assert [parameter.requires_grad for parameter in task.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_every_method_is_told_before_the_next_begins() -> None:
    seen: list[FitReport] = []
    names: list[str] = []
    report = trady.fit(
        small_net(), torch.zeros(2, 3, 12, 12), methods=["full", "head"], done=seen.append, at=names.append
    )
    assert [[row.method for row in each.rows] for each in seen] == [["full"], ["full", "head"]]
    assert not any(each.complete for each in seen)
    assert report.complete
    assert names == ["tracing", "full fine-tuning", "head only"]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    task = llama()
    report = trady.fit(task.model, task.batch, methods=["full", "bitfit", "trady"], memory="4 MiB")
    report.save(tmp_path / "fit.json")
    assert FitReport.load(tmp_path / "fit.json") == report
    damaged: dict[str, Any] = report.to_json()
    damaged["rows"][0]["peak_bytes"] = "much"
    with pytest.raises(TradyError, match=r"rows\[0\].peak_bytes is 'much', not a whole number"):
        FitReport.from_json(damaged)
    with pytest.raises(TradyError, match="version"):
        FitReport.from_json({**report.to_json(), "version": 2})


def test_a_model_that_looks_at_values_is_told_what_it_saw_in_a_batch_of_any_size() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)
            self.wide = nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            if (x.detach().sum() * 0 == 0).item():
                x = self.wide(x)
            return self.head(x.mean(1))

    report = trady.fit(Chooses(), torch.randint(20, (4, 6)), methods=["full"], memory="1 MiB")
    assert report["full"].refused is None
    assert report["full"].trainable_parameters == sum(p.numel() for p in Chooses().parameters())
    assert report["full"].largest_batch


def test_a_function_is_called_so_that_its_model_takes_no_memory() -> None:
    report = trady.fit("tests.fits:heavy", methods=["full", "head"], image_size=8)
    assert report.weight_bytes > 37 * 2**30
    assert report["full"].peak_bytes > 4 * report.weight_bytes
    report = trady.fit("tests.fits:careful", methods=["full"], batch_size=2)
    assert (report.image_size, report.batch_size) == (16, 2)


@pytest.mark.parametrize(
    ("model", "kind", "count"), [(Residual(), "BasicBlock", 2), (PreActivation(), "Sequential", 2)]
)
def test_blocks_are_found(model: nn.Module, kind: str, count: int) -> None:
    found = blocks_of(model)
    assert [type(block).__name__ for block in found] == [kind] * count
    report = trady.fit(model, torch.zeros(4, 3, 32, 32), methods=["full", "checkpoint", "head", "last-1", "last-2"])
    assert report["checkpoint"].peak_bytes < report["full"].peak_bytes
    trained = [report[method].trainable_parameters for method in ("head", "last-1", "last-2", "full")]
    assert trained == sorted(set(trained))


def test_adapters_without_memory_are_those_of_peft() -> None:
    pytest.importorskip("peft")
    from trady.simulation.meta_copy import meta_copy

    real, bare = llama(torch.bfloat16).model, meta_copy(llama(torch.bfloat16).model)
    assert add_adapters(real, rank=4) == add_adapters(bare, rank=4)

    def outline(model: nn.Module) -> Mapping[str, tuple[Any, ...]]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    assert outline(real) == outline(bare)
    assert all(parameter.is_meta for parameter in bare.parameters())


def test_the_usual_methods_are_known() -> None:
    assert all(read_method(name).title for name in USUAL if name != "trady")
