"""Runs over several processes: saved and stopped in the middle of an epoch, all at the same step, and gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.small_runs import lines, without_clock

_WORKER = """
import os, signal, sys
from pathlib import Path
import numpy as np, random, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tests.small_runs import run
from tests.small_task import small_data
from trady.training import loop, saver
from trady.training.checkpoint import load_checkpoint
from trady.training.interrupt import Stopped

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])


class Shaken(Dataset):
    def __init__(self, seed, samples): self.images = small_data(samples, seed)
    def __len__(self): return len(self.images)
    def __getitem__(self, index):
        image, label = self.images[index]
        return image + torch.rand(()) + np.random.random() + random.random(), label


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 8, 3, padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Loss:
    def __init__(self, on_rank, after, then): self.calls, self.rank, self.after, self.then = 0, on_rank, after, then
    def __call__(self, output, labels):
        self.calls += 1
        if self.calls == self.after and rank == self.rank: self.then()
        return F.cross_entropy(output, labels)


class Crash(Exception): pass


def crash(): raise Crash


def train(name, loss, **options):
    return run(out / name, model=model(), data=(Shaken(0, 48), Shaken(1, 24)), epochs=2, batch_size=4, loss=loss,
               policy="dynamic-random", optimizer="adamw", lr=0.01, **options)


calm = Loss(-1, 0, crash)
train("unbroken", calm)
try:
    train("stopped", Loss(1, 11, lambda: signal.raise_signal(signal.SIGTERM)))
except Stopped as stop:
    assert stop.signal == signal.SIGTERM
else:
    raise AssertionError("not stopped")
torch.distributed.barrier()
found = load_checkpoint(out / "stopped" / "checkpoint")
assert (found.epoch, found.step) == (0, 8), (found.epoch, found.step)
assert {"epoch", "epoch-1"} <= set(found.states), set(found.states)
assert not torch.equal(found.states["epoch"].tensors["torch"], found.states["epoch-1"].tensors["torch"])
train("stopped", calm, resume=True)
try:
    train("crashed", Loss(rank, 5, crash), checkpoint_every=1e-9)
except Crash:
    pass
torch.distributed.barrier()
assert load_checkpoint(out / "crashed" / "checkpoint").step == 4
train("crashed", calm, checkpoint_every=1e-9, resume=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_a_run_that_was_stopped_or_saved_inside_an_epoch_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_file(tmp_path / "unbroken" / "model.safetensors")
    for name in ("stopped", "crashed"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
        assert without_clock(lines(tmp_path / name)) == without_clock(lines(tmp_path / "unbroken")), name
