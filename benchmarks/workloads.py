"""What is measured: a model, a batch, and which channels TraDy trains in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from benchmarks.backbones import IMAGE_SIZE, load_backbone
from benchmarks.shares import ShareOfEveryLayer, budget_of
from trady.errors import ModelError

MIB = 2**20

#: Outputs of the new heads of the pretrained models.
CLASSES = 10


@dataclass(frozen=True)
class Task:
    """A model and one batch to train it on.

    Attributes:
        model: Gives class scores, alone or as ``output.logits``.
        images: The batch, [N, 3, H, W].
        labels: Class indices, [N].
    """

    model: nn.Module
    images: Tensor
    labels: Tensor

    def loss(self) -> Tensor:
        """Run the model on the batch; return the mean cross entropy."""
        return F.cross_entropy(class_scores(self.model(self.images)), self.labels)


def class_scores(output: Any) -> Tensor:
    """Return the scores in a model's output."""
    scores: Tensor = output if isinstance(output, Tensor) else output.logits
    return scores


@dataclass(frozen=True)
class Bars:
    """What a workload is held to.

    Attributes:
        peak_over_inference: Highest working peak of a TraDy step over that of inference (working: without
            weights and batch).
        saved_bytes: Most that a TraDy step may keep between forward and backward; ``None`` is no bar.
    """

    peak_over_inference: float = 1.0
    saved_bytes: int | None = None


@dataclass(frozen=True)
class Workload:
    """One line of the benchmarks.

    Attributes:
        name: What ``--workload`` takes.
        describe: Model, batch and what TraDy trains, for people.
        make: Builds a fresh task; takes the folder of the backbones. The same one every time.
        policy: Where TraDy updates.
        budget: What TraDy may spend; ``None`` is exactly what the policy draws.
        bars: What TraDy must reach.
    """

    name: str
    describe: str
    make: Callable[[Path], Task]
    policy: str
    budget: str | None = None
    bars: Bars = Bars()

    def arm(self, task: Task, seed: int = 0, ranking: trady.LayerRanking | None = None) -> trady.Tuner:
        """Prepare the task's model for TraDy."""
        budget = self.budget or budget_of(self.policy, task.model, task.images)
        return trady.prepare(task.model, task.images, budget=budget, policy=self.policy, ranking=ranking, seed=seed)


def noise(batch: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1] and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return images, torch.randint(classes, (batch,), generator=generator)


def _resnet50(models: Path) -> Task:
    try:
        from transformers import ResNetConfig, ResNetForImageClassification
    except ImportError:
        raise ModelError('resnet50 needs an extra: pip install "trady[transformers]"') from None
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig())
    return Task(model, *noise(16, 224, model.config.num_labels))


def _efficientnet_lite0(models: Path) -> Task:
    from trady.training.models import EFFICIENTNET_LITE0, load_model

    return Task(load_model(EFFICIENTNET_LITE0, CLASSES).model, *noise(32, 128, CLASSES))


def _backbone(name: str) -> Callable[[Path], Task]:
    def make(models: Path) -> Task:
        return Task(load_backbone(name, models, num_classes=CLASSES), *noise(32, IMAGE_SIZE, CLASSES))

    return make


def _share(numerator: int, denominator: int) -> str:
    """Register the policy that trains this share of every layer; return its name."""
    policy = trady.register_policy(ShareOfEveryLayer(Fraction(numerator, denominator)), replace=True)
    return policy.name


#: B_mem of the paper's smallest budget, in elements for one sample.
B_MEM = "elements:27946"

_IN_FIRST_EPOCH = "policy trady without a ranking, in its first epoch: draws from all layers"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "resnet50",
            "ResNet-50 (transformers, random weights), 16×3×224×224; 1/64 of the channels of every layer",
            _resnet50,
            _share(1, 64),
            bars=Bars(saved_bytes=40 * MIB),
        ),
        Workload(
            "effnet",
            "EfficientNet-Lite0, 32×3×128×128; 3 % of the channels of every layer",
            _efficientnet_lite0,
            _share(3, 100),
        ),
        Workload(
            "mbv2-w0.35",
            f"MobileNetV2-w0.35, 32×3×128×128; {B_MEM}, {_IN_FIRST_EPOCH}",
            _backbone("mbv2-w0.35"),
            "trady",
            B_MEM,
        ),
        Workload(
            "mcunet-5fps",
            f"MCUNet-5fps, 32×3×128×128; {B_MEM}, {_IN_FIRST_EPOCH}",
            _backbone("mcunet-5fps"),
            "trady",
            B_MEM,
        ),
    )
}
