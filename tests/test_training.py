from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import trady
from tests.small_runs import BUDGET, lines, run, without_clock
from tests.small_task import StopAfter, small_data, small_net, write_npz
from trady.errors import BudgetError, DataError, PolicyError, StateError, TrainingError
from trady.training.interrupt import Interrupts
from trady.training.run import finetune
from trady.training.schedule import make_schedule

POLICIES = ("trady", "dynamic-random", "head", "full")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_leaves_the_run_folder_that_the_docs_describe(tmp_path: Path, policy: str) -> None:
    result = run(tmp_path, policy=policy)
    metrics = lines(tmp_path)
    assert [m["epoch"] for m in metrics] == [0, 1, 2]
    assert [m["step"] for m in metrics] == [6, 12, 18]
    wanted = {
        "epoch",
        "step",
        "train_loss",
        "accuracy",
        "seconds",
        "peak_bytes",
        "channels",
        "selection_hash",
    }
    assert wanted <= set(metrics[0])
    assert all(m["peak_bytes"] > 0 and m["seconds"] > 0 for m in metrics)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["accuracy"] == result.accuracy == metrics[-1]["accuracy"]
    assert written["peak_bytes"] == max(m["peak_bytes"] for m in metrics)
    assert json.loads((tmp_path / "plan.json").read_text())["policy"] == policy
    names = {path.name for path in tmp_path.iterdir()}
    files = {"plan.json", "metrics.jsonl", "checkpoint", "model.safetensors", "best.safetensors", "result.json"}
    assert names == files | {"run.json"} | (set() if policy == "full" else {"delta.safetensors"})
    weights = load_file(tmp_path / "model.safetensors")
    expected = result.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_full_fine_tuning_learns_the_small_task(tmp_path: Path) -> None:
    model = small_net().train()
    images, _ = small_data(48, 0).batch(range(48))
    with torch.no_grad():
        for _ in range(60):
            model(images)  # fine-tuning keeps the statistics of normalisation: they must fit, as a pretrained net's do
    result = run(None, model=model, policy="full", epochs=6, lr=0.1)
    assert result.accuracy > 0.9
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_full_fine_tuning_changes_all_that_is_not_frozen_and_no_statistics_and_keeps_the_flags() -> None:
    model = small_net()
    model.features[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(None, model=model, policy="full", epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in model.named_parameters()} - {"features.0.weight"}
    assert not model.features[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize("policy", ["trady", "full"])
def test_equal_seeds_give_equal_runs_and_leave_the_callers_random_numbers_alone(policy: str) -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.random()), random.random()  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)

    seed()
    expected = draws()
    seed()
    first = run(None, policy=policy)
    assert draws() == expected
    torch.rand(7)
    second = run(None, policy=policy)
    other = run(None, policy=policy, seed=1)
    assert [m.train_loss for m in first.history] == [m.train_loss for m in second.history]
    assert [m.train_loss for m in first.history] != [m.train_loss for m in other.history]


@pytest.mark.parametrize("policy", ["trady", "head", "full"])
@pytest.mark.parametrize("optimizer", [{"momentum": 0.9}, {"optimizer": "adamw", "lr": 0.01}])
def test_resumed_run_ends_bit_for_bit_where_the_unbroken_one_does(
    tmp_path: Path, policy: str, optimizer: dict[str, Any]
) -> None:
    settings = {"policy": policy, "epochs": 4, **optimizer}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run(unbroken, **settings)

    with pytest.raises(KeyboardInterrupt):
        run(broken, progress=StopAfter(2), **settings)
    assert [m["epoch"] for m in lines(broken)] == [0, 1]
    result = run(broken, resume=True, **settings)
    assert len(result.history) == 4
    assert without_clock(lines(broken)) == without_clock(lines(unbroken))
    assert (broken / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_an_epoch_of_several_draws_trains_more_channels_than_one_draw_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"policy": "dynamic-random", "draws_per_epoch": 3, "momentum": 0.9, "epochs": 2}
    once, whole, broken = tmp_path / "once", tmp_path / "whole", tmp_path / "broken"
    run(once, **{**settings, "draws_per_epoch": 1})
    run(whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(broken, progress=StopAfter(1), **settings)
    run(broken, resume=True, **settings)

    def trained(out: Path) -> int:
        new, old = load_file(out / "model.safetensors"), small_net().state_dict()
        changes = [(new[name] - old[name]).abs().amax((0, 2, 3)) for name in new if new[name].dim() == 4]
        return sum(int((change > 0).sum()) for change in changes)

    assert trained(whole) > trained(once)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert without_clock(lines(broken)) == without_clock(lines(whole))


def test_the_draws_of_an_epoch_are_evenly_spread_and_each_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    for name in ("redraw", "ledger", "clip_gradients"):
        original = getattr(trady.Tuner, name)

        def spy(self: Any, *given: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            happened.append(_name)
            return _original(self, *given, **named)

        monkeypatch.setattr(trady.Tuner, name, spy)
    run(None, policy="dynamic-random", draws_per_epoch=3, epochs=1)
    measured = ["ledger", "clip_gradients", "clip_gradients"]
    assert happened == [*measured, "redraw", *measured, "redraw", *measured]


def test_more_draws_than_steps_are_refused() -> None:
    with pytest.raises(TrainingError, match="draws_per_epoch is 7, and an epoch has 6 steps"):
        run(None, draws_per_epoch=7)
    with pytest.raises(TrainingError, match="draws_per_epoch is 0"):
        run(None, draws_per_epoch=0)


def test_resuming_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    first = run(tmp_path, policy="full")
    again = run(tmp_path, policy="full", resume=True)
    assert again.accuracy == first.accuracy
    assert again.seconds == first.seconds
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert len(run(tmp_path / "new", policy="full", resume=True, epochs=1).history) == 1


def test_a_run_that_is_there_is_never_overwritten_unasked(tmp_path: Path) -> None:
    run(tmp_path, policy="full", epochs=1)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(StateError, match=r"--resume.*--overwrite"):
        run(tmp_path, policy="full", epochs=1, seed=3)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    run(tmp_path, policy="full", epochs=1, seed=3, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() != before
    with pytest.raises(StateError, match="exclude each other"):
        run(tmp_path, policy="full", epochs=1, resume=True, overwrite=True)


class Exploding(nn.Module):
    """Gives infinite losses from a certain number of training batches on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.net = small_net()
        self.left = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.net(x)
        self.left -= self.training
        return scores * float("nan") if self.left < 0 else scores


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 3, step 16.*epoch 2 is kept.*--lr"):
        run(tmp_path, policy="full", model=Exploding(after=15))
    assert [m["epoch"] for m in lines(tmp_path)] == [0, 1]
    weights = load_file(tmp_path / "checkpoint" / "tensors.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_loss_that_is_not_finite_names_a_checkpoint_inside_its_epoch(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 2, step 9, .*the checkpoint of step 8 is kept"):
        run(tmp_path, policy="full", model=Exploding(after=8), checkpoint_every=1e-9)


def test_a_diverging_rate_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        run(tmp_path, policy="full", lr=1e30, max_grad_norm=None, warmup_epochs=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "lots"}, BudgetError, "lots"),
        ({"policy": "tradi"}, PolicyError, "trady"),
        ({"epochs": 0}, TrainingError, "epochs is 0"),
        ({"lr": -1.0}, TrainingError, "learning rate is -1"),
        ({"warmup_epochs": 3.0}, TrainingError, "less than 3"),
        ({"optimizer": "lion"}, TrainingError, "there are sgd, adam, adamw"),
        ({"optimizer": "adam", "momentum": 0.9}, TrainingError, "belongs to sgd"),
        ({"mode": "both"}, TrainingError, "train, eval"),
        ({"mixed_precision": "fp16"}, TrainingError, "no, bf16"),
        ({"max_grad_norm": 0.0}, TrainingError, "more than zero"),
        ({"batch_size": 0}, DataError, "batch_size is 0"),
        ({"data": (small_data(0, 0), small_data(3, 0))}, DataError, "training data is empty"),
        ({"data": (small_data(3, 0), small_data(0, 0))}, DataError, "evaluation data is empty"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_labels_that_the_model_has_no_output_for_are_refused() -> None:
    with pytest.raises(DataError, match="labels run from 0 to 2, but the model has 2 classes"):
        run(None, policy="full", model=small_net(classes=2))


def test_a_loader_of_dicts_and_a_model_with_logits_train(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.net(pixel_values)}

    def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        images, labels = zip(*examples, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    def loader() -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(small_data(24, 0), 8, shuffle=True, collate_fn=collate)

    first = run(None, policy="full", model=Wrapped(), data=(loader(), loader()), epochs=2)
    again = run(None, policy="full", model=Wrapped(), data=(loader(), loader()), epochs=2)
    assert [m.train_loss for m in first.history] == [m.train_loss for m in again.history]


def test_dropout_is_off_in_training_in_eval_mode_and_always_in_evaluation() -> None:
    seen: list[tuple[bool, bool]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_grad_enabled(), self.net.dropout.training))
            return self.net(x)

    run(None, policy="full", model=Watched(), epochs=1, mode="eval")
    assert set(seen) == {(True, False), (False, False)}
    seen.clear()
    run(None, policy="full", model=Watched(), epochs=1)
    assert set(seen) == {(True, True), (False, False)}


def test_bf16_trains_and_says_so_in_its_settings(tmp_path: Path) -> None:
    run(tmp_path, policy="full", epochs=1, mixed_precision="bf16")
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["mixed_precision"] == "bf16"


def test_gradients_are_clipped_to_the_norm() -> None:
    model = small_net()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    run(None, policy="full", model=model, data=(small_data(8, 0), small_data(3, 0)), epochs=1,
        lr=1.0, warmup_epochs=0, max_grad_norm=0.01)  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


@given(st.integers(1, 60), st.integers(1, 40), st.floats(1e-6, 10))
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(epochs: int, steps: int, lr: float) -> None:
    schedule = make_schedule(lr, epochs, steps, None)
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    top = schedule.warmup_steps
    assert max(rates) == rates[top] == pytest.approx(lr)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) >= 0
    assert abs(top - 0.1 * schedule.steps) <= 0.5


@pytest.mark.parametrize("policy", ["trady"])
def test_a_run_killed_five_times_ends_with_the_losses_of_one_never_killed(tmp_path: Path, policy: str) -> None:
    data = write_npz(tmp_path / "data.npz")
    epochs = 12
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    command = [
        sys.executable, "-m", "trady", "finetune", "tests.small_task:small_net", str(data),
        "--budget", BUDGET, "--policy", policy, "--epochs", str(epochs), "--image-size", "12",
        "--batch-size", "8", "--lr", "0.05", "--momentum", "0.9", "--resume", "--out",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run([*command, str(unbroken)], check=True, **quiet)
    rng = random.Random(7)
    kills = 0
    for goal in (1, 3, 5, 8, 10):
        process = subprocess.Popen([*command, str(killed)], **quiet)
        metrics = killed / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < goal):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 5
    subprocess.run([*command, str(killed)], check=True, **quiet)
    assert without_clock(lines(killed)) == without_clock(lines(unbroken))
    assert len(lines(killed)) == epochs
    for name in ("model.safetensors", "delta.safetensors"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()


def test_finetune_is_part_of_the_public_face() -> None:
    assert trady.finetune is finetune


def test_ctrl_c_waits_for_the_end_of_a_step_and_a_second_one_does_not() -> None:
    reached = []

    def step(*, signals: int) -> None:
        with Interrupts() as interrupts:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
            reached.append(f"the end of the step, after {signals}")
            interrupts.check()
            reached.append("the next step")

    with pytest.raises(KeyboardInterrupt):
        step(signals=1)
    with pytest.raises(KeyboardInterrupt):
        step(signals=2)
    assert reached == ["the end of the step, after 1"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
