"""How a run goes, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from trady.training.batch import Loss
from trady.training.data.augment import AugmentName
from trady.training.optimizers import OptimizerFactory
from trady.training.precision import Precision
from trady.training.progress import Display
from trady.training.provenance import UNTOLD, Origin
from trady.training.settings import OBSERVED_BATCHES


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, beside what is asked of the budget; :func:`trady.finetune` says what each is for."""

    epochs: int
    out: str | Path | None
    batch_size: int = 32
    lr: float | None = None
    warmup_epochs: float | None = None
    channel_clip: float | Literal["auto"] | None = "auto"
    max_grad_norm: float | None = 2.0
    resume: bool = False
    overwrite: bool = False
    optimizer: str | OptimizerFactory | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    loss: Loss | None = None
    mode: Literal["train", "eval"] = "train"
    mixed_precision: Precision = "no"
    observed_batches: int = OBSERVED_BATCHES
    draws_per_epoch: int = 1
    augment: AugmentName = "none"
    checkpoint_every: str | float | None = None
    keep_best: bool = True
    patience: int | None = None
    capture: bool = False
    progress: bool | Display = True
    log: Console | None = None
    say: Callable[[str], object] = lambda text: None
    origin: Origin = UNTOLD
