"""Image classifiers: convolutional networks and vision transformers, on images of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.backbones import IMAGE_SIZE, load_backbone
from benchmarks.tasks import CrossEntropy, Task, needs, seeded

#: Outputs of the new heads.
CLASSES = 10


def noise(batch: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1] and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return images, torch.randint(classes, (batch,), generator=generator)


def _classifier(model: nn.Module, batch: int, size: int, classes: int = CLASSES) -> Task:
    images, labels = noise(batch, size, classes)
    return Task(model, images, CrossEntropy(labels))


def resnet50(batch: int = 16, size: int = 224, depths: tuple[int, ...] = (3, 4, 6, 3)) -> Task:
    """ResNet-50 with random weights."""
    hf = needs("transformers", "transformers")
    config = hf.ResNetConfig(depths=list(depths))
    return _classifier(seeded(lambda: hf.ResNetForImageClassification(config)), batch, size, config.num_labels)


def efficientnet_lite0(batch: int = 32, size: int = 128) -> Task:
    """EfficientNet-Lite0 with its ImageNet weights and a new head."""
    from trady.training.models.load import EFFICIENTNET_LITE0, load_model

    return _classifier(seeded(lambda: load_model(EFFICIENTNET_LITE0, CLASSES).model), batch, size)


def mobilenet_v2(batch: int = 32, size: int = 128) -> Task:
    """MobileNetV2 1.0 with random weights; its statistics are those of the batch."""
    hf = needs("transformers", "transformers")
    config = hf.MobileNetV2Config(num_labels=CLASSES, classifier_dropout_prob=0.0)
    task = _classifier(seeded(lambda: hf.MobileNetV2ForImageClassification(config)), batch, size)
    # With those of a fresh network the signal fades to nothing over 52 layers, and tiny numbers are slow.
    norms = [module for module in task.model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        task.model.train()(task.batch)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return task


def backbone(name: str) -> Callable[[Path], Task]:
    """Return the builder of one of the paper's two backbones."""

    def make(models: Path) -> Task:
        return _classifier(seeded(lambda: load_backbone(name, models, num_classes=CLASSES)), 32, IMAGE_SIZE)

    return make


def vit(batch: int = 8, size: int = 224, layers: int = 12) -> Task:
    """ViT-Tiny: 192 wide, 3 heads, patches of 16 pixels, random weights."""
    hf = needs("transformers", "transformers")
    config = hf.ViTConfig(
        num_labels=CLASSES,
        image_size=size,
        patch_size=16,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _classifier(seeded(lambda: hf.ViTForImageClassification(config)), batch, size)


def swin(batch: int = 4, size: int = 224, depths: tuple[int, ...] = (2, 2, 6, 2)) -> Task:
    """Swin-Tiny with random weights; no stochastic depth."""
    hf = needs("transformers", "transformers")
    config = hf.SwinConfig(
        num_labels=CLASSES,
        image_size=size,
        depths=list(depths),
        num_heads=[3, 6, 12, 24][: len(depths)],
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _classifier(seeded(lambda: hf.SwinForImageClassification(config)), batch, size)
