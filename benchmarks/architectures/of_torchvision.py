"""Networks of torchvision without weights, on small images: classifiers, segmentation, the detectors' backbones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tasks import CrossEntropy, Task, needs, seeded

CLASSIFIERS = "alexnet googlenet shufflenet_v2_x0_5 squeezenet1_1"

VIDEO = "r3d_18"

SEGMENTATION = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"

DETECTION = "fasterrcnn_mobilenet_v3_large_fpn retinanet_resnet50_fpn ssdlite320_mobilenet_v3_large"

#: Sides of images that are not 64.
SIZES = {"alexnet": 96, "ssdlite320_mobilenet_v3_large": 320}

NAMES = tuple(name for names in (CLASSIFIERS, VIDEO, SEGMENTATION, DETECTION) for name in names.split())


def task_of(architecture: str) -> Task:
    """Build the model, and a batch with labels; of a detector its backbone, which is all that trains by channel."""
    torchvision = needs("torchvision", "torchvision")
    size, random = SIZES.get(architecture, 64), torch.Generator().manual_seed(0)

    def build() -> Any:
        more: dict[str, Any] = {}
        if architecture in SEGMENTATION.split() + DETECTION.split():
            more["weights_backbone"] = None
        if architecture in SEGMENTATION.split() and not architecture.startswith("lraspp"):
            more["aux_loss"] = True
        if architecture == "googlenet":
            more["init_weights"] = True
        return torchvision.models.get_model(architecture, weights=None, num_classes=5, **more)

    model: Any = seeded(build)
    if architecture in SEGMENTATION.split():
        classes = torch.randint(5, (2, size, size), generator=random)
        return Task(model, torch.randn(2, 3, size, size, generator=random), _Pixels(classes))
    if architecture in DETECTION.split():
        return Task(model.backbone, torch.randn(2, 3, size, size, generator=random), _maps_loss)
    shape = (3, 16, size, size) if architecture in VIDEO.split() else (3, size, size)
    loss = _WithAuxiliary if architecture == "googlenet" else CrossEntropy
    return Task(model, torch.randn(2, *shape, generator=random), loss(torch.tensor([0, 4])))


class _Pixels(CrossEntropy):
    """As torchvision's reference script: the auxiliary classifier counts half."""

    def __call__(self, output: Any) -> Tensor:
        loss = F.cross_entropy(output["out"], self.labels)
        return loss + 0.5 * F.cross_entropy(output["aux"], self.labels) if "aux" in output else loss


class _WithAuxiliary(CrossEntropy):
    def __call__(self, output: Any) -> Tensor:
        return sum((F.cross_entropy(scores, self.labels) for scores in output), torch.zeros(()))


def _maps_loss(maps: Any) -> Tensor:
    """Stand for what a detector's heads ask of the feature maps."""
    return sum((feature.square().mean() for feature in maps.values()), torch.zeros(()))
