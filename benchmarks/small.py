"""The workloads of the benchmarks at a size that a test, or a first look at a device, can afford."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import text, vision
from benchmarks.tasks import Task
from benchmarks.workloads import WORKLOADS, Workload

#: Those that need no file; the backbones of the paper have no small form.
SMALL: dict[str, Callable[[Path], Task]] = {
    "resnet50": lambda models: vision.resnet50(2, 32, depths=(1, 1, 1, 1)),
    "effnet": lambda models: vision.efficientnet_lite0(2, 32),
    "mobilenetv2": lambda models: vision.mobilenet_v2(2, 32),
    "minilm": lambda models: text.minilm(2, 8),
    "gpt2-small-like": lambda models: text.gpt2(2, 8, layers=1, width=64, vocabulary=100),
    "vit-tiny": lambda models: vision.vit(2, 32, layers=1),
    "swin-tiny": lambda models: vision.swin(1, 56, depths=(1, 1)),
    "llama-tiny": lambda models: text.llama(2, 8, layers=1, width=64, intermediate=96, vocabulary=100),
}


def small(name: str) -> Workload:
    """Return a workload in small, with its policy and bars."""
    return replace(WORKLOADS[name], make=SMALL[name])
