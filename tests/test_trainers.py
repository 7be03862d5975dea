"""Trainers of other libraries, through ``trady.tune``: they end where plain training of the same tensors ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trady
from benchmarks.trainers.builds import BUILDS, plain, seq2seq, sft
from benchmarks.trainers.checks import ASKED, BAR, cell, quiet
from trady.errors import ModelError, StateError, TrainingError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

#: The library that a trainer is of, where it is not transformers.
LIBRARIES = {
    "SFTTrainer": "trl", "DPOTrainer": "trl", "RewardTrainer": "trl", "GRPOTrainer": "trl",
    "SentenceTransformerTrainer": "sentence_transformers",
}  # fmt: skip

CELLS = [
    *((trainer, feature) for trainer in BUILDS for feature in ("all at once", "resume", "bf16")),
    *((trainer, "generation") for trainer in ("Seq2SeqTrainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer")),
    ("SFTTrainer", "packing"),
]


@pytest.mark.parametrize(("trainer", "feature"), CELLS)
def test_it_ends_where_plain_training_of_the_same_tensors_ends(trainer: str, feature: str) -> None:
    if trainer in LIBRARIES:
        pytest.importorskip(LIBRARIES[trainer])
    found = cell(trainer, feature)
    assert found.error is not None
    assert found.error <= BAR
    assert found.changed is not None
    assert found.changed > 100 * BAR
    assert found.logged < 1e-4


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with quiet():
        yield


def test_what_a_step_calls_is_what_is_recorded(tmp_path: Path) -> None:
    """Two passes, one with positional arguments; parts of a model, with the classifier beside them."""
    found = {}
    for name in ("Trainer", "Trainer, two forwards", "Trainer, model.bert(…)"):
        made = BUILDS[name](tmp_path / name, {"max_steps": 1})
        session = trady.tune(made, **ASKED)
        made.train()
        assert session.plan is not None
        assert session._step is not None
        found[name] = session._step.module, session._step.calls, session.plan.head
    assert found == {
        "Trainer": ("", 1, ("classifier",)),
        "Trainer, two forwards": ("", 2, ("classifier",)),
        "Trainer, model.bert(…)": ("bert", 1, ()),
    }


def test_a_fused_language_model_head_is_not_replaced_by_the_layer_below(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    made = sft(tmp_path, {"max_steps": 1})
    session = trady.tune(made, **ASKED)
    made.train()
    assert session.plan is not None
    assert session.plan.head == ()
    assert any("down_proj" in layer.name for layer in session.plan.table)


class OneShot(torch.utils.data.IterableDataset[Any]):
    """Samples that are there once."""

    def __init__(self, count: int) -> None:
        self.read: list[int] = []
        self._samples = iter(range(count))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in self._samples:
            self.read.append(index)
            ids = torch.arange(4, 10 + index % 5)
            yield {"input_ids": ids, "labels": torch.tensor(index % 2)}


def test_data_that_is_there_once_is_trained_on_from_its_first_sample(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    data = OneShot(16)
    made = plain(tmp_path, {"max_steps": 4})
    made.train_dataset = data
    trady.tune(made, **ASKED)
    original = made.compute_loss

    def compute_loss(model: nn.Module, inputs: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and made.trady.tuner is not None:
            seen.append(inputs["input_ids"].clone())
        return original(model, inputs, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    assert len(seen) == 4
    assert sum(len(ids) for ids in seen) == 16
    assert data.read == list(range(16))


def ids_trained_on(made: Any) -> list[Tensor]:
    """Train, and return the tokens of each step."""
    seen: list[Tensor] = []
    original = made.training_step

    def training_step(model: nn.Module, inputs: Any, *args: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return original(model, inputs, *args)

    made.training_step = training_step
    made.train()
    return seen


def test_a_collator_with_a_generator_masks_what_it_masks_without_a_budget(tmp_path: Path) -> None:
    def run(tuned: bool) -> list[Tensor]:
        made = plain(tmp_path / str(tuned), {"max_steps": 3})
        generator = torch.Generator().manual_seed(1)
        padding = made.data_collator

        class Masking:
            def __init__(self) -> None:
                self.generator = generator

            def __call__(self, samples: Any) -> Any:
                batch = padding(samples)
                hidden = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.3
                batch["input_ids"][hidden] = 3
                return batch

        made.data_collator = Masking()
        if tuned:
            trady.tune(made, **ASKED)
        return ids_trained_on(made)

    plainly, tuned = run(False), run(True)
    assert len(plainly) == len(tuned) == 3
    assert all(torch.equal(a, b) for a, b in zip(plainly, tuned, strict=True))


def test_data_with_a_generator_gives_what_it_gives_without_a_budget(tmp_path: Path) -> None:
    class Jittered(torch.utils.data.Dataset[Any]):
        """Words are drawn when a sample is read."""

        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(2)

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.randint(4, 60, (4 + index % 5,), generator=self.generator)
            return {"input_ids": ids, "labels": index % 2}

    def run(tuned: bool) -> list[Tensor]:
        made = plain(tmp_path / str(tuned), {"max_steps": 3})
        made.train_dataset = Jittered()
        if tuned:
            trady.tune(made, **ASKED)
        return ids_trained_on(made)

    plainly, tuned = run(False), run(True)
    assert len(plainly) == len(tuned) == 3
    assert all(torch.equal(a, b) for a, b in zip(plainly, tuned, strict=True))


def test_the_largest_batch_is_known_from_the_lengths(tmp_path: Path) -> None:
    made = seq2seq(tmp_path, {"max_steps": 1})
    longest = sorted((len(row["input_ids"]) + len(row["labels"]) for row in made.train_dataset), reverse=True)
    session = trady.tune(made, **ASKED)
    made.train()
    assert session._step is not None
    batch = session._step.example.inputs
    rows = batch["input_ids"].shape[1] + batch["labels"].shape[1]
    assert rows >= longest[0]


def test_an_optimizer_that_was_handed_over_is_adopted_and_given_back(tmp_path: Path) -> None:
    made = plain(tmp_path, {})
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3)
    made.optimizer = optimizer
    before = list(optimizer.param_groups[0]["params"])
    weights = {name: value.clone() for name, value in made.model.state_dict().items()}
    session = trady.tune(made, **ASKED)
    made.train()
    assert made.optimizer is not None
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))
    assert {id(p) for p in optimizer.state} <= {id(p) for p in before}
    changed = [name for name, value in made.model.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed
    assert session.delta()
    made.train()  # and once more, with the same one


def test_trainers_that_cannot_be_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    made = plain(tmp_path, {})
    for setting in ("torch_compile", "neftune_noise_alpha"):
        setattr(made.args, setting, 5)
        names = set(vars(made))
        with pytest.raises(ModelError, match="a memory budget does not work with"):
            trady.tune(made, **ASKED)
        assert set(vars(made)) == names
        setattr(made.args, setting, None)
    with pytest.raises(ModelError, match=r"TradyCallback, for a loop of your own trady\.prepare"):
        trady.tune(nn.Linear(2, 2), **ASKED)
    with pytest.raises(TrainingError, match="draws_per_epoch is 0"):
        trady.tune(made, **ASKED, draws_per_epoch=0)
    trady.tune(made, **ASKED)
    with pytest.raises(StateError, match="has a budget already"):
        trady.tune(made, **ASKED)


def test_a_trainer_without_an_optimizer_to_be_found_trains_nothing(tmp_path: Path) -> None:
    made = plain(tmp_path, {"max_steps": 1})
    other = nn.Linear(2, 2)
    made.optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    trady.tune(made, **ASKED)
    with pytest.raises(StateError, match="none of the model's parameters"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert all(not module._forward_hooks for module in made.model.modules())
    assert len(made.optimizer.param_groups[0]["params"]) == 2


def test_a_model_that_is_exchanged_while_it_trains_is_refused(tmp_path: Path) -> None:
    made = plain(tmp_path, {})
    trady.tune(made, **ASKED)

    class Exchanges(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            made.model = nn.Linear(2, 2)

    made.add_callback(Exchanges())
    with pytest.raises(StateError, match=r"trainer\.model is another one"):
        made.train()


_WORKER = """
import os, sys, torch, trady
from pathlib import Path
from benchmarks.trainers.builds import plain
from benchmarks.trainers.checks import ASKED, weights_of
out = Path(sys.argv[1])
made = plain(out, {"num_train_epochs": 1, "ddp_backend": "gloo", "per_device_train_batch_size": 2})
before = weights_of(made.model)
session = trady.tune(made, **ASKED, recompute="none")
made.train()
torch.save((before, weights_of(made.model)), out / f"rank{os.environ['RANK']}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_plan_before_ddp_wraps_the_model_and_end_alike(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (before, one), (_, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not torch.equal(value, before[name]) for name, value in one.items())
