"""What people train several processes with, each with the real library: equal weights everywhere, and one reduction."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trady
from tests.distributed_training import Told, Training
from tests.models import Residual, normal, same, seeded, snapshot
from tests.ranks import Raised, Scenario, together
from tests.small_task import write_npz
from trady.process.ranks import processes

ADAMW = partial(torch.optim.AdamW, lr=0.01)
OF_ONE_PROCESS = Training("BERT", "all", ADAMW, accumulation=3)


def accelerate(rank: int, count: int, *, prepared_first: bool) -> Told:
    """Accelerate with ``accumulate``, the model prepared by trady before or after."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, example = OF_ONE_PROCESS.build()
    options: dict[str, Any] = {"budget": OF_ONE_PROCESS.budget, "seed": 3, "recompute": "all", "accumulates": True}
    tuner, told, outer = None, Told(), model
    if prepared_first:
        outer = accelerator.prepare(model)
    tuner = trady.prepare(model, example, ranking="structural", **options)
    optimizer = accelerator.prepare(tuner.attach(ADAMW(tuner.parameters())))
    if not prepared_first:
        outer = accelerator.prepare(model)
    for step in range(OF_ONE_PROCESS.steps):
        if step % 2 == 0:
            tuner.resample(step // 2)
        before = _calls(tuner)
        for batch in OF_ONE_PROCESS.batches(step, rank, count):
            with accelerator.accumulate(outer):
                accelerator.backward(outer(**batch).logits.square().mean())
                optimizer.step()
                optimizer.zero_grad()
        told.calls.append(_calls(tuner) - before)
    told.weights = snapshot(tuner.finish())
    return told


def _calls(tuner: trady.Tuner) -> int:
    return tuner._arrivals.reduction.traffic.calls


def trainer(rank: int, count: int, out: Path, kind: str) -> tuple[Told, dict[str, Tensor]]:
    """The Trainer of transformers, or one of TRL: texts of other lengths in each process, recomputed, accumulating."""
    from benchmarks.trainers import builds
    from benchmarks.trainers.checks import ASKED, weights_of

    options = {"num_train_epochs": 2, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
    made = getattr(builds, kind)(out, {**options, "gradient_accumulation_steps": 2})
    before = weights_of(made.model)
    session, told = trady.tune(made, **{**ASKED, "policy": "trady", "ranking": "structural"}, recompute="all"), Told()
    disarm = session._disarm

    def noted() -> None:
        if session.tuner is not None:
            told.calls.append(_calls(session.tuner))
        disarm()

    session._disarm = noted  # type: ignore[method-assign]
    made.train()
    told.calls.append(made.state.global_step)
    told.weights = weights_of(made.model)
    return told, before


def lightning(rank: int, count: int, out: Path) -> tuple[Told, dict[str, Tensor]]:
    """Lightning's DDP, which wraps the module before a callback sees it, with accumulation."""
    import lightning.pytorch as pl

    from trady.integrations.lightning import TradyCallback

    class Task(pl.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(Residual)
            self.calls: list[int] = []

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    callback = TradyCallback(budget="elements:900", ranking="structural")

    class Counts(pl.Callback):  # type: ignore[misc, unused-ignore]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            told.calls.append(_calls(callback.tuner))  # type: ignore[arg-type]

    told, task = Told(), Task()
    before = snapshot(task.net)
    data = DataLoader(TensorDataset(normal(32, 3, 9, 9), torch.arange(32) % 5), batch_size=4, shuffle=True)
    fitting = pl.Trainer(
        accelerator="cpu", devices=count, strategy="ddp", max_epochs=2, accumulate_grad_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=out,
        callbacks=[Counts(), callback],
    )  # fmt: skip
    fitting.fit(task, data)
    told.calls.append(fitting.global_step)
    told.weights = snapshot(task.net)
    return told, before


def finetune(rank: int, count: int, out: Path, **options: Any) -> tuple[Told, dict[str, Tensor]]:
    """``trady.finetune`` in several processes, with parts of a batch."""
    model, told = seeded(Residual), Told()
    before = snapshot(model)
    data = TensorDataset(normal(32, 3, 9, 9), torch.arange(32) % 5)
    asked = {"budget": "elements:900", "policy": "trady", "ranking": "structural", "lr": 0.05, **options}
    result = trady.finetune(
        model, data, data, epochs=2, out=out / f"{asked['policy']}", batch_size=8, progress=False, **asked
    )
    told.weights = snapshot(result.model)
    told.calls = [epoch.averaging_calls for epoch in result.history]
    told.nbytes = [epoch.averaged_bytes for epoch in result.history]
    told.losses = [epoch.evaluation_loss for epoch in result.history]
    return told, before


def other_settings(rank: int, count: int, out: Path) -> None:
    """``trady.finetune`` with a rate of its own in each process."""
    finetune(rank, count, out / "other", lr=(0.05, 0.02)[rank])


# -- what is refused ---------------------------------------------------------------------------------------------


def _arm(model: nn.Module, *shape: int) -> trady.Tuner:
    return trady.prepare(model, normal(*(shape or (2, 3, 9, 9))), budget="elements:900", ranking="structural")


def _train(model: nn.Module, tuner: trady.Tuner, *shape: int) -> None:
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    model(normal(*(shape or (2, 3, 9, 9)))).square().mean().backward()


def fsdp2_before(rank: int, count: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = seeded(Residual)
    fully_shard(model)
    _arm(model)


def fsdp2_after(rank: int, count: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = seeded(Residual)
    tuner = _arm(model)
    fully_shard(model)
    _train(model, tuner)


def fsdp1_before(rank: int, count: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    _arm(FullyShardedDataParallel(seeded(Residual), device_id=torch.device("cpu")))


def _two_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))


def _cut(model: nn.Module, count: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(model, init_device_mesh("cpu", (count,)), {"0": ColwiseParallel()})


def tensor_parallel_before(rank: int, count: int) -> None:
    model = seeded(_two_linear)
    _cut(model, count)
    _arm(model, 2, 8)


def tensor_parallel_after(rank: int, count: int) -> None:
    model = seeded(_two_linear)
    tuner = _arm(model, 2, 8)
    _cut(model, count)
    _train(model, tuner, 2, 8)


REFUSED: dict[str, tuple[Scenario, str]] = {
    "FSDP2 before": (fsdp2_before, "this FSDPResidual is sharded by fully_shard (FSDP2)"),
    "FSDP2 after": (fsdp2_after, "the weight of stem.0 has become a DTensor"),
    "FSDP1 before": (fsdp1_before, "this FullyShardedDataParallel is sharded by FullyShardedDataParallel"),
    "tensor parallel before": (tensor_parallel_before, "0.weight of this Sequential is a DTensor"),
    "tensor parallel after": (tensor_parallel_after, "the weight of 0 has become a DTensor"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("ways")
    scenarios: dict[str, Scenario] = {
        "Accelerate, before": partial(accelerate, prepared_first=True),
        "Accelerate, after": partial(accelerate, prepared_first=False),
        "Trainer": partial(trainer, out=folder / "trainer", kind="plain"),
        "TRL's SFT": partial(trainer, out=folder / "sft", kind="sft"),
        "TRL's DPO": partial(trainer, out=folder / "dpo", kind="dpo"),
        "finetune, other settings": partial(other_settings, out=folder),
        "finetune": partial(finetune, out=folder, micro_batch=2),
        "finetune, full": partial(finetune, out=folder, policy="full", budget=None),
        "finetune, measured": partial(finetune, out=folder, policy="velocity", draws_per_epoch=2),
        **{name: scenario for name, (scenario, _) in REFUSED.items()},
        "Lightning": partial(lightning, out=folder),
    }
    return together(scenarios, folder)


@pytest.mark.parametrize("name", ["Accelerate, before", "Accelerate, after"])
def test_accelerate_accumulates_without_averaging_and_ends_where_one_process_does(
    two: dict[str, list[Any]], name: str
) -> None:
    first, second = two[name]
    assert isinstance(first, Told), first
    alone = OF_ONE_PROCESS(0, 1)
    assert same(first.weights, second.weights)
    assert first.calls == [1] * OF_ONE_PROCESS.steps
    for key, value in alone.weights.items():
        torch.testing.assert_close(first.weights[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["Trainer", "TRL's SFT", "TRL's DPO", "Lightning"])
def test_trainers_average_once_a_step_and_end_alike(two: dict[str, list[Any]], name: str) -> None:
    assert not isinstance(two[name][0], Raised), two[name][0]
    (first, before), (second, _) = two[name]
    assert same(first.weights, second.weights)
    assert not same(first.weights, before)
    calls, steps = first.calls
    assert calls == steps > 2


@pytest.mark.parametrize("name", ["finetune", "finetune, full", "finetune, measured"])
def test_finetune_averages_once_a_step_and_says_what(two: dict[str, list[Any]], name: str) -> None:
    assert not isinstance(two[name][0], Raised), two[name][0]
    (first, before), (second, _) = two[name]
    assert same(first.weights, second.weights)
    assert not same(first.weights, before)
    assert first.losses == second.losses
    assert first.calls == [1, 1]
    assert all(nbytes > 0 for nbytes in first.nbytes)


def test_finetune_sends_a_part_of_what_full_training_sends(two: dict[str, list[Any]]) -> None:
    ours, full = two["finetune"][0][0].nbytes[0], two["finetune, full"][0][0].nbytes[0]
    trained = sum(p.nbytes for p in Residual().parameters())
    assert full == pytest.approx(trained, rel=0.05)
    assert ours < full / 2


def test_other_settings_are_refused_together(two: dict[str, list[Any]]) -> None:
    for told in two["finetune, other settings"]:
        assert isinstance(told, Raised)
        assert "lr is 0.05 on rank 0, 0.02 on rank 1" in told.text


@pytest.mark.parametrize("name", REFUSED)
def test_weights_in_parts_are_refused_before_anything_runs(two: dict[str, list[Any]], name: str) -> None:
    for told in two[name]:
        assert isinstance(told, Raised)
        assert told.kind == "ModelError", told
        assert told.text.startswith(REFUSED[name][1])
        assert "torchrun" in told.text


# -- a rank that dies, and torchrun ------------------------------------------------------------------------------

_LOOP = """
import os, signal, sys, time, torch, trady
from tests.models import Residual, normal, seeded
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
model = seeded(Residual)
tuner = trady.prepare(model, normal(2, 3, 9, 9), budget="elements:900", ranking="structural")
optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
dies = int(sys.argv[2])
for step in range(8):
    model(normal(2, 3, 9, 9, seed=2 * step + rank)).square().mean().backward()
    if step == dies and rank == 1:
        print("dies at", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    optimizer.zero_grad()
torch.save(tuner.finish().state_dict(), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


_RUN = """
import os, sys, torch, trady
from torch.utils.data import TensorDataset
from tests.models import Residual, normal, seeded
class Loss(torch.nn.Module):
    steps = 0
    def forward(self, output, labels):
        self.steps += self.training and torch.is_grad_enabled()
        bad = self.steps == 4 and os.environ["RANK"] == "1"
        return torch.nn.functional.cross_entropy(output, labels) * (float("nan") if bad else 1)
data = TensorDataset(normal(64, 3, 9, 9), torch.arange(64) % 5)
trady.finetune(seeded(Residual), data, data, budget="elements:900", ranking="structural", epochs=2, out=None,
               batch_size=4, loss=Loss(), progress=False)
"""


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **more}


def test_a_loop_of_ones_own_under_torchrun_ends_alike(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(_LOOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "loop.py"), str(tmp_path), "-1"],
        env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert not same(first, snapshot(seeded(Residual)))


def test_the_command_under_torchrun_is_one_run(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "data.npz")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trady"]
    asked = ["--image-size", "12", "--out", "run", "--budget", "update:20 KiB", "--epochs", "2", "--batch-size", "8"]
    done = subprocess.run(
        [*command, "finetune", "tests.small_task:small_net", str(data), *asked, "--policy", "velocity"],
        env=_environment(), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights, metrics and plan are in run") == 1
    assert sum("epoch 1/2" in line for line in done.stderr.splitlines()) == 1
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [each["averaging_calls"] for each in metrics] == [1, 1]
    assert (tmp_path / "run" / "result.json").exists()


def test_a_rank_that_is_killed_ends_the_others_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(_LOOP)
    started = _both([str(tmp_path / "loop.py"), str(tmp_path), "3"])
    _, said = started[0].communicate(timeout=300)
    ended = time.time()
    died, _ = started[1].communicate(timeout=300)
    assert started[1].returncode == -signal.SIGKILL
    assert started[0].returncode == 1
    assert "another process of this run has ended or does not answer, so rank 0 of 2 stops too" in said
    assert float(died.split()[-1]) <= ended
    assert processes() == 1


def test_a_run_that_stops_tells_the_others_why(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(_RUN)
    said = [each.communicate(timeout=300)[1] for each in _both([str(tmp_path / "run.py")])]
    assert "the loss became nan in epoch 1, step 4" in said[1]
    assert "rank 1 has stopped with TrainingError: the loss became nan in epoch 1, step 4" in said[0]


def _both(command: list[str]) -> list[subprocess.Popen[str]]:
    """Start both processes without torchrun, which would end them itself."""
    port = str(20000 + (os.getpid() + 7919 * len(command)) % 20000)
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                ACCELERATE_USE_CPU="true",
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
