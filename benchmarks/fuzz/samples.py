"""One small file of every kind, written by trady itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from trady.compare.cell_folder import CellFolder, Status
from trady.compare.cells import make_jobs
from trady.compare.read import read_matrix
from trady.compare.results import write_rows
from trady.compare.rows import make_row
from trady.policies.schemes import Scheme
from trady.records.files import write_json
from trady.study.folder import StudyFolder
from trady.study.run import StudyTask, record
from trady.study.settings import StudySettings
from trady.training.checkpoint import Checkpoint, save_checkpoint
from trady.training.data.datasets import CENTERED, ImageDataset
from trady.training.state import State, optimizer_to_state
from trady.training.within_epoch import WITHIN, EpochSums

MATRIX = """
policies = ["trady", "head", "sparse-update"]
seeds = [0, 1]
datasets = ["fashion-mnist"]

[models]
small = "benchmarks.fuzz.samples:small_net"

[budgets]
little = "elements:2000"
more = { small = "peak:1 MiB" }

[training]
epochs = 1
lr = 0.05

[[override]]
policy = "sparse-update"
scheme = "scheme.json"
batch_size = 16
"""


class SmallNet(nn.Module):
    """Two convolutions with normalisation and a classifier of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        scores: Tensor = self.classifier(F.relu(self.second(x)).mean((2, 3)))
        return scores


def small_net(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return SmallNet()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4) % 3) for _ in range(count)]


def data(count: int) -> torch.utils.data.TensorDataset:
    found = batches(count)
    return torch.utils.data.TensorDataset(*(torch.cat([batch[part] for batch in found]) for part in range(2)))


def trained(folder: Path) -> None:
    """Train for an epoch, on images, into a run folder."""
    labels = np.arange(8) % 3
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3)).astype(np.uint8)
    images = ImageDataset(pixels, labels.astype(np.int64), 8, CENTERED, ("a", "b", "c"))
    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "progress": False}
    trady.finetune(small_net(), images, images, policy="head", out=folder / "run", **options)


def records(folder: Path) -> None:
    """Write the records that are one file each, and a delta."""
    example, _ = batches(1)[0]
    plan = trady.plan(small_net(), example, budget="peak:60 KiB", ranking="structural", seed=1)
    plan.save(folder / "plan.json")
    trady.rank(small_net(), batches(2), F.cross_entropy).save(folder / "ranking.json")
    Scheme((0, 1), (0.5, 0.25), 2).save(folder / "scheme.json")
    model = small_net()
    trady.measure(lambda: model(example).sum().backward(), model=model).save(folder / "ledger.json")
    settings = {"ratios": [0.5], "epochs": 1, "batch_size": 32, "lr": 0.1, "seed": 0, "model": "0" * 16}
    write_json(
        folder / "analysis.json", {"settings": settings, "accuracies": {"head": 0.3, "0@0.5": 0.4, "1@0.5": 0.5}}
    )
    tuner, _ = session("trady")
    from safetensors.torch import save_file

    save_file(tuner.delta(), folder / "delta.safetensors", {"format": "trady-delta"})


def session(policy: str) -> tuple[trady.Tuner, torch.optim.Optimizer]:
    """Return an armed tuner that has trained for two epochs, and its optimizer."""
    ranking: Any = "online" if policy == "trady" else None
    example, _ = batches(1)[0]
    tuner = trady.prepare(small_net(), example, budget="elements:900", policy=policy, seed=5, ranking=ranking)
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    for epoch in range(2):
        if tuner.observation_due:
            tuner.observe(batches(2), F.cross_entropy)
        tuner.resample(epoch)
        for inputs, labels in batches(2):
            F.cross_entropy(tuner.model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return tuner, optimizer


def checkpoint(folder: Path, policy: str) -> None:
    """Write the checkpoint of a session."""
    tuner, optimizer = session(policy)
    given = tuner.state_dict()
    states = {
        "trainer": State(given["tensors"], given["meta"]),
        "optimizer": optimizer_to_state(optimizer),
        WITHIN: EpochSums(2, 1, 5, 4, 1.5).to_state(),
    }
    facts = {"training examples": 3, "training classes": ["a", "b"]}
    save_checkpoint(folder / "checkpoint", Checkpoint(1, 5, {"lr": 0.01, "seed": 5}, "", states, facts, "0" * 16))


def study(folder: Path) -> None:
    """Write a study of one run."""
    settings = StudySettings("small", epochs=1, batch_size=4, noise_batches=2)
    task = StudyTask("tiny", data(3), data(2), lambda seed: small_net())
    record(StudyFolder(folder / "study"), settings, [lambda: task], ["tiny"], [0], progress=False)


def comparison(folder: Path) -> None:
    """Write a matrix, one finished cell and one that failed, and their table."""
    (folder / "matrix.toml").write_text(MATRIX)
    Scheme((0, 1), (0.5, 0.25), 2).save(folder / "scheme.json")
    jobs = make_jobs(read_matrix(folder / "matrix.toml", check_sources=False))
    done = CellFolder(folder / "done", jobs[0].cell)
    done.begin({"device": "x86_64", "threads": 1, "torch": "2", "trady": "0"})
    trady.finetune(small_net(), data(4), data(2), budget=None, policy="head", epochs=2, out=done.path, progress=False)
    failed = CellFolder(folder / "failed", jobs[1].cell)
    failed.write_error(Status.FAILED, "it was tired")
    write_rows([make_row(done), make_row(failed)], folder)


def arrays(folder: Path) -> None:
    """Write an ``.npz`` file of twelve images."""
    random = np.random.default_rng(0)
    np.savez_compressed(
        folder / "data.npz",
        x_train=random.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8),
        y_train=np.arange(12) % 3,
        x_test=random.integers(0, 255, (6, 8, 8), dtype=np.uint8),
        y_test=np.arange(6)[:, None] % 3,
        classes=np.array(["a", "b", "c"]),
    )


def pictures(folder: Path) -> None:
    """Write an image of every kind, in two classes."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number, ending in enumerate(("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")):
        place = folder / "photos" / ("cat", "dog")[number % 2] / f"{number}.{ending}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(place)


def idx(folder: Path) -> None:
    """Write a file in the format of MNIST."""
    content = b"\x00\x00\x08\x03" + np.array([5, 4, 4], ">u4").tobytes() + bytes(range(80))
    (folder / "images.gz").write_bytes(gzip.compress(content))


def configuration(folder: Path) -> None:
    """Write the configuration of a model of transformers, and its preprocessor's."""
    config = {
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 16, "image_size": 8,
        "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4, "num_channels": 3,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True, "dtype": "float32",
    }  # fmt: skip
    processor = {
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 8, "width": 8},
    }
    for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
        place = folder / "model" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(value))
