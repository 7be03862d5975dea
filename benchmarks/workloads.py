"""What is measured: a model, a batch, and which channels TraDy trains in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import trady
from benchmarks import text, vision
from benchmarks.shares import ShareOfEveryLayer, budget_of
from benchmarks.tasks import Task

MIB = 2**20

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bars:
    """What TraDy's step is held to. Peaks are working peaks: without weights and batch.

    Attributes:
        peak_over_inference: Highest peak over that of inference.
        saved_bytes: Most that a step may keep between forward and backward; ``None`` is no bar.
        peak_aim: Where the first should come to; ``None`` is no further aim.
        below_peers: Whether the peak must be below that of every other method but ``head``.
        gradient_error: Largest relative error of a layer's gradient; ``None`` measures none.
        step_over_full: Aim for the time of a step over that of full fine-tuning. No gate.
        step_over_floor: Aim for the time of a step over that of the floor. No gate.
    """

    peak_over_inference: float = 1.0
    saved_bytes: int | None = None
    peak_aim: float | None = None
    below_peers: bool = False
    gradient_error: float | None = None
    step_over_full: float = 0.5
    step_over_floor: float = 1.0


CNN = Bars()
TRANSFORMER = Bars(
    peak_over_inference=2.0,
    peak_aim=1.6,
    below_peers=True,
    gradient_error=1e-4,
    step_over_full=0.7,
    step_over_floor=1.15,
)


@dataclass(frozen=True)
class Workload:
    """One line of the benchmarks.

    Attributes:
        name: What ``--workload`` takes.
        describe: Model, batch and what TraDy trains, for people.
        make: Builds a fresh task; takes the folder of the backbones. The same one every time.
        policy: Where TraDy updates.
        budget: What TraDy may spend; ``None`` is exactly what the policy draws.
        static_policy: The same with channels drawn once: PaCA's rule.
        bars: What TraDy must reach.
        kind: A ``transformer`` keeps its convolutions out of LoRA; a ``cnn`` lives in them.
        blocks: Classes of the modules that checkpointing recomputes, where the model has no switch of its own.
    """

    name: str
    describe: str
    make: Callable[[Path], Task]
    policy: str
    budget: str | None = None
    static_policy: str = "static-random"
    bars: Bars = CNN
    kind: Literal["cnn", "transformer"] = "cnn"
    blocks: tuple[str, ...] = ()

    def arm(
        self,
        task: Task,
        seed: int = 0,
        ranking: trady.LayerRanking | None = None,
        policy: str | None = None,
        recompute: str = "auto",
        max_step_flops: float | None = None,
    ) -> trady.Tuner:
        """Prepare the task's model for TraDy, or for another policy in the same budget."""
        policy = policy or self.policy
        budget = self.budget or budget_of(policy, task.model, task.batch)
        return trady.prepare(
            task.model,
            task.batch,
            budget=budget,
            policy=policy,
            ranking=ranking or "online",
            seed=seed,
            recompute=recompute,
            max_step_flops=max_step_flops,
        )


def laid_out(
    workload: Workload, *, channels_last: bool = False, device: torch.device = CPU, dtype: torch.dtype | None = None
) -> Workload:
    """Return the workload as it is to be run, by every method.

    Args:
        workload: The workload.
        channels_last: Whether convolutions and images are in that layout.
        device: Where model, batch and labels are.
        dtype: Of weights and images; ``None`` is the workload's own.

    """

    def make(models: Path) -> Task:
        task = workload.make(models).to(device, dtype)
        if not channels_last:
            return task
        task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not isinstance(task.batch, Tensor) or task.batch.dim() != 4:
            return task
        return replace(task, batch=task.batch.contiguous(memory_format=torch.channels_last))

    return replace(workload, make=make, describe=workload.describe + "; channels_last" * channels_last)


#: B_mem of the paper's smallest budget, in elements for one sample.
B_MEM = "elements:27946"

_IN_FIRST_EPOCH = "policy trady without a ranking, in its first epoch: draws from all layers"


def share_workload(
    name: str,
    describe: str,
    make: Callable[[], Task],
    share: Fraction,
    bars: Bars,
    blocks: tuple[str, ...] = (),
) -> Workload:
    """Return a workload in which this share of every layer trains."""
    drawn, once = (
        trady.register_policy(ShareOfEveryLayer(share, once=once), replace=True).name for once in (False, True)
    )
    return Workload(
        name,
        describe,
        lambda models: make(),
        drawn,
        static_policy=once,
        bars=bars,
        kind="transformer" if bars is TRANSFORMER else "cnn",
        blocks=blocks,
    )


def _backbone(name: str, title: str) -> Workload:
    describe = f"{title}, 32×3×128×128; {B_MEM}, {_IN_FIRST_EPOCH}"
    return Workload(name, describe, vision.backbone(name), "trady", B_MEM, blocks=("Block",))


_TWO_PERCENT = Fraction(2, 100)

WORKLOADS = {
    workload.name: workload
    for workload in (
        share_workload(
            "resnet50",
            "ResNet-50 (transformers, random weights), 16×3×224×224; 1/64 of the channels of every layer",
            vision.resnet50,
            Fraction(1, 64),
            Bars(saved_bytes=40 * MIB),
            blocks=("ResNetBottleNeckLayer",),
        ),
        share_workload(
            "effnet",
            "EfficientNet-Lite0, 32×3×128×128; 3 % of the channels of every layer",
            vision.efficientnet_lite0,
            Fraction(3, 100),
            CNN,
            blocks=("MBConvBlock",),
        ),
        share_workload(
            "mobilenetv2",
            "MobileNetV2 1.0 (transformers, random weights), 32×3×128×128; 3 % of the channels of every layer",
            vision.mobilenet_v2,
            Fraction(3, 100),
            CNN,
            blocks=("MobileNetV2Stem", "MobileNetV2InvertedResidual"),
        ),
        _backbone("mbv2-w0.35", "MobileNetV2-w0.35"),
        _backbone("mcunet-5fps", "MCUNet-5fps"),
        share_workload(
            "minilm",
            "MiniLM-L6 (real weights) with a classifier, 32×128 tokens; 2 % of the channels of every layer",
            text.minilm,
            _TWO_PERCENT,
            TRANSFORMER,
        ),
        share_workload(
            "gpt2-small-like",
            "GPT-2 (4 layers, 256 wide, random weights), 8×256 tokens; 2 % of the channels of every layer",
            text.gpt2,
            _TWO_PERCENT,
            TRANSFORMER,
        ),
        share_workload(
            "vit-tiny",
            "ViT-Tiny (random weights), 8×3×224×224; 2 % of the channels of every layer",
            vision.vit,
            _TWO_PERCENT,
            TRANSFORMER,
        ),
        share_workload(
            "swin-tiny",
            "Swin-Tiny (random weights), 4×3×224×224; 2 % of the channels of every layer",
            vision.swin,
            _TWO_PERCENT,
            TRANSFORMER,
        ),
        share_workload(
            "llama-tiny",
            "Llama (4 layers, 256 wide, random weights), 8×256 tokens; 2 % of the channels of every layer",
            text.llama,
            _TWO_PERCENT,
            TRANSFORMER,
        ),
    )
}
