"""Detectors of torchvision: the backbone trains by channel inside of the detector, and so does all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trady
from benchmarks.gradients import layer_errors
from trady.estimates.heads import train_with_fixed_statistics

models = pytest.importorskip("torchvision.models", reason="torchvision does not import beside every build of PyTorch")

#: Options of :func:`trady.prepare`: the same channels in every run.
ASKED: dict[str, Any] = {"budget": "elements:100000", "policy": "static-random", "ranking": "structural"}


def detector(name: str) -> Any:
    torch.manual_seed(0)
    small = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **small)


def batch(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with one to three boxes each."""
    random = torch.Generator().manual_seed(seed)
    targets = []
    for _ in range(2):
        corner = 30 * torch.rand(1 + seed % 3, 2, generator=random)
        boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(corner.shape, generator=random)], 1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, 3, (len(boxes),), generator=random)})
    return [torch.rand(3, 64, 64, generator=random) for _ in range(2)], targets


def backward(model: nn.Module, seed: int) -> float:
    train_with_fixed_statistics(model)
    torch.manual_seed(seed)  # samples of proposals
    loss = sum(model(*batch(seed)).values(), torch.zeros(()))
    loss.backward()
    return float(loss.detach())


def check(dense: nn.Module, sparse: nn.Module, part: nn.Module, tuner: trady.Tuner) -> None:
    """Compare gradients on batches with other numbers of boxes than the example's."""
    dense.requires_grad_(True)
    for seed in range(2):
        for parameter in (*tuner.parameters(), *dense.parameters(), *sparse.parameters()):
            parameter.grad = None
        assert backward(sparse, seed) == pytest.approx(backward(dense, seed), rel=1e-5)
        assert max(layer_errors(part, tuner).values()) < 1e-4


def test_a_backbone_trains_inside_of_its_detector() -> None:
    name = "fasterrcnn_mobilenet_v3_large_fpn"
    dense, sparse = detector(name), detector(name)
    tuner = trady.prepare(sparse.backbone, torch.rand(2, 3, 64, 64), head=None, **ASKED)
    check(dense, sparse, dense.backbone, tuner)
    # What lies beside the backbone trains whole.
    heads = zip(dense.roi_heads.named_parameters(), sparse.roi_heads.parameters(), strict=True)
    for (_, wanted), got in heads:
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-6)


def test_a_detector_trains_as_a_whole_on_a_real_example() -> None:
    name = "fasterrcnn_mobilenet_v3_large_fpn"
    dense, sparse = detector(name), detector(name)
    check(dense, sparse, dense, trady.prepare(sparse, batch(0), **ASKED))


def test_without_values_the_error_says_to_prepare_the_backbone() -> None:
    with torch.device("meta"):
        model = models.get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None, num_classes=3)
    images, targets = batch(0)
    with pytest.raises(trady.ModelError, match=r"trady\.prepare\(model\.backbone, "):
        trady.prepare(model, (images, targets), **ASKED)
