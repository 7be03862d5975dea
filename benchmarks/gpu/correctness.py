"""Are gradients and trainings on the GPU right?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import TensorDataset

import trady
from benchmarks.backbones import load_backbone
from benchmarks.gpu.where import Figures, Where, forget, in_dtype
from benchmarks.gradients import gradient_errors
from benchmarks.tasks import seeded
from benchmarks.vision import CLASSES
from trady.model.batch import Batch
from trady.tuner.capture import CapturedStep

#: Dtype of weights, of autocast, and what is recomputed.
VARIANTS: dict[str, tuple[str | None, str | None, str]] = {
    "float32": (None, None, "auto"),
    "float32, all recomputed": (None, None, "all"),
    "autocast bf16": (None, "bfloat16", "auto"),
    "autocast bf16, all recomputed": (None, "bfloat16", "all"),
    "bf16": ("bfloat16", None, "auto"),
}


def gradients(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Compare one workload's gradients with the plain model's, in every dtype; report the layers' errors.

    In bf16 the two differ by the rounding of other kernels: to be read beside ``bf16 against float32``, the error
    of the plain model's own gradients in bf16.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    found: Figures = {}
    for variant, (dtype, autocast, recompute) in VARIANTS.items():
        if where.seconds_left < 0:
            break
        workload = where.workload(item, in_dtype(dtype))
        try:
            errors = gradient_errors(workload, where.models, recompute=recompute, autocast=in_dtype(autocast))
            ordered = sorted(errors.values())
            found[variant] = {"largest": ordered[-1], "median": ordered[len(ordered) // 2], "layers": len(ordered)}
        except trady.TradyError:
            raise
        except Exception as error:
            found[variant] = {"error": f"{type(error).__name__}: {error}"[:500]}
        forget(where.device)
        write(found)


def replays(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Train twice on the same batches, with passes that run and with passes that are replayed; compare the weights.

    Eight steps of AdamW on batches that differ, over two draws; ``difference`` is ‖a - b‖ / ‖a - start‖ over all
    weights, ``again`` the same of two trainings with passes that run: kernels with atomic sums differ by themselves.
    """
    ends = [_short_training(item, where, capture=capture) for capture in (False, True, False)]
    start = where.workload(item).make(where.models).model.state_dict()
    moved = _distance(ends[0][0], start)
    write(
        {
            "difference": _distance(ends[0][0], ends[1][0]) / moved,
            "again": _distance(ends[0][0], ends[2][0]) / moved,
            "uncaptured_because": ends[1][1],
            "losses": [end[2] for end in ends],
        }
    )


def _short_training(item: str, where: Where, *, capture: bool) -> tuple[dict[str, Tensor], str | None, list[float]]:
    torch.manual_seed(0)
    task = where.workload(item).make(where.models)
    tuner = where.workload(item).arm(task)
    task.model.train()
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=1e-4))
    generator = torch.Generator(where.device).manual_seed(0)

    def passes(batch: Any) -> Tensor:
        loss = replace(task, batch=batch).run()
        loss.backward()
        return loss

    step, losses = (tuner.capture(passes) if capture else passes), []
    reason = None
    for epoch in (1, 2):
        tuner.resample(epoch)
        for _ in range(8):
            order = torch.randperm(Batch.of(task.batch).samples, generator=generator, device=where.device)
            losses.append(float(step(_rolled(task.batch, int(order[0]))).detach()))
            optimizer.step()
            optimizer.zero_grad()
        reason = step.reason if isinstance(step, CapturedStep) else None
    tuner.finish()
    return {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}, reason, losses


def _rolled(batch: Any, by: int) -> Any:
    """Other inputs under the same labels; a tensor that is there twice stays one."""
    rolled = cache(lambda tensor: tensor.roll(by + 1, -1).contiguous())
    return tree_map_only(Tensor, rolled, batch)


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    pairs = [(a[name].double(), b[name].double()) for name in a if a[name].is_floating_point()]
    return float(torch.stack([(x - y).norm() for x, y in pairs]).norm())


def training(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Train MobileNetV2-w0.35 on patterns, on the device or on the CPU; report accuracy and loss of each epoch.

    The data are made here, from a seed: each class is a sum of waves of its own, under noise and at random places.
    """
    device, _, seed = item.partition("-")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # finetune takes a GPU where there is one
    run_on = where.device if device == "device" else torch.device("cpu")
    size, images = (32, 64) if where.small else (128, 640)
    train, evaluation = (TensorDataset(*patterns(images // part, size, part)) for part in (1, 2))
    model = seeded(lambda: load_backbone("mbv2-w0.35", where.models, CLASSES)).to(run_on)
    result = trady.finetune(
        model,
        train,
        evaluation,
        budget="elements:27946",
        epochs=1 if where.small else 3,
        out=None,
        seed=int(seed),
        progress=False,
    )
    epochs = result.history
    write(
        {
            "device": str(next(result.model.parameters()).device),
            "accuracy": [epoch.accuracy for epoch in epochs],
            "loss": [epoch.train_loss for epoch in epochs],
            "seconds": [epoch.seconds for epoch in epochs],
        }
    )


def patterns(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [N, 3, size, size] in [-1, 1] and labels: waves of a class's own, shifted, under noise."""
    waves = np.random.default_rng(0).uniform(1, 8, (CLASSES, 3, 4, 2))
    random = np.random.default_rng((1, seed))
    labels = random.integers(CLASSES, size=count)
    x = np.linspace(0, 1, size)
    shift = random.uniform(0, 2 * np.pi, (count, 1, 4, 1, 1))
    w = waves[labels]
    phase = 2 * np.pi * (w[..., 0, None, None] * x[:, None] + w[..., 1, None, None] * x) + shift
    images = np.sin(phase).mean(2) + random.normal(0, 0.7, (count, 3, size, size))
    return torch.from_numpy(images.clip(-2, 2) / 2).float(), torch.from_numpy(labels)
