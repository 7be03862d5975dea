"""The settings of a run: written in its checkpoint, equal on resume.

What a :class:`trady.planning.request.Request` holds was checked there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trady.errors import BudgetError, TrainingError
from trady.optim.clipping import AUTO
from trady.ranking.ranking import LayerRanking

#: Batches that policies are measured on if they measure before they draw.
OBSERVED_BATCHES = 4


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run. Two runs with equal settings and data are equal.

    Attributes:
        policy: Name of the policy.
        budget: As text, ``None`` for plain full fine-tuning.
        ranking: Digest of the given layer ranking, or ``online`` or ``structural``; empty without one.
        epochs: Passes over the training data.
        steps: Optimizer steps of the run.
        batch_size: Examples a step in each process that the run was started in; ``None`` where the user's loader
            decides.
        lr: Rate at the end of the warm-up; ``None`` is that of the user's own optimizer.
        warmup_steps: Steps of the warm-up.
        channel_clip: Limit of a channel's gradient norm over the channel's own, or ``auto``; ``None`` is no limit.
        max_grad_norm: Limit of the head's gradient norm (of all gradients without a tuner); ``None`` is no limit.
        optimizer: Its name; ``custom`` for the user's own.
        momentum: For ``sgd``.
        weight_decay: For named optimizers.
        mode: ``train`` or ``eval``: whether dropout is on in training.
        mixed_precision: ``no`` or ``bf16``.
        seed: Seed of everything random.
        recompute: What is recomputed in the backward pass: ``auto``, ``all`` or ``none``.
        fidelity: How exactly smooth activations are differentiated: ``exact``, ``8bit`` or ``4bit``.
        micro_batch: Samples a forward and backward pass, ``auto``, or ``None`` for the full batch.
        observed_batches: Batches that the policy is measured on; ``None`` if it measures nothing.
        draws_per_epoch: How often channels are drawn in an epoch.
        augment: How training images are varied; ``None`` takes them as they are.
        train_layers: Layers that channels are drawn from, as text; ``None`` is all that may train.
        freeze: Layers that stay as they are, as text.
        over_budget: What happens where not even one sample fits, ``refuse`` or ``warn``; ``None`` is ``adapt``.
        max_step_flops: What a step may take of the operations of full fine-tuning; ``None`` is no limit.
        patience: Epochs without a better accuracy after which the run ends; ``None`` trains all.
        added_at: Epochs that were done when the last ones were added to a finished run; ``None`` where none were.
        processes: How many processes the run was started in; ``None`` is one.
    """

    policy: str
    budget: str | None
    ranking: str
    epochs: int
    steps: int
    batch_size: int | None
    lr: float | None
    warmup_steps: int
    channel_clip: float | str | None
    max_grad_norm: float | None
    optimizer: str
    momentum: float
    weight_decay: float
    mode: str
    mixed_precision: str
    seed: int
    recompute: str = "auto"
    fidelity: str = "exact"
    micro_batch: int | str | None = None
    observed_batches: int | None = None
    draws_per_epoch: int = 1
    augment: str | None = None
    train_layers: str | None = None
    freeze: str | None = None
    over_budget: str | None = None
    max_step_flops: float | None = None
    patience: int | None = None
    added_at: int | None = None
    processes: int | None = None

    def __post_init__(self) -> None:
        for name, value, possible in (
            ("mode", self.mode, ("train", "eval")),
            ("mixed_precision", self.mixed_precision, ("no", "bf16")),
        ):
            if value not in possible:
                raise TrainingError(f"{name} is {value!r}; possible are {', '.join(possible)}")
        for name, limit in (("channel_clip", self.channel_clip), ("max_grad_norm", self.max_grad_norm)):
            if isinstance(limit, str):
                if name != "channel_clip" or limit != AUTO:
                    raise TrainingError(
                        f"{name} is {limit!r}; give a number{', auto' * (name == 'channel_clip')} or None"
                    )
            elif limit is not None and not limit > 0:
                raise TrainingError(f"{name} is {limit}; give more than zero, or None")

        if self.observed_batches is not None and self.observed_batches < 1:
            raise TrainingError(f"observed_batches is {self.observed_batches}; give at least 1")
        if self.patience is not None and self.patience < 1:
            raise TrainingError(f"patience is {self.patience}; give at least 1 epoch, or leave it out")
        if self.draws_per_epoch < 1:
            raise TrainingError(f"draws_per_epoch is {self.draws_per_epoch}; give at least 1")
        if self.micro_batch is not None and self.optimizer.endswith("-in-backward"):
            raise TrainingError(
                f"{self.optimizer} updates a layer in every backward pass, and micro-batches need several for one "
                f"update: take {self.optimizer.removesuffix('-in-backward')}, or leave micro_batch out"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)


def ranking_digest(ranking: LayerRanking | str | None) -> str:
    """Return sixteen digits that name a ranking, or the word that was given for it; empty for none."""
    if ranking is None or isinstance(ranking, str):
        return ranking or ""
    return hashlib.sha256(json.dumps(ranking.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def refuse_limit_of_full(max_step_flops: float | None) -> None:
    """Refuse to hold plain full fine-tuning to less than it takes.

    Raises:
        BudgetError: There is a limit.

    """
    if max_step_flops is not None:
        raise BudgetError(
            f"max_step_flops={max_step_flops:g}x is for policies that draw channels, and policy 'full' trains "
            "everything with plain PyTorch: leave it out, or take another policy, such as trady"
        )


def refuse_capture(policy: str, device: torch.device) -> None:
    """Refuse to capture steps where there is nothing to capture.

    Raises:
        TrainingError: The run is not on CUDA, or its model is not armed.

    """
    if device.type != "cuda":
        raise TrainingError(
            f"capture records steps as CUDA graphs, and this run is on {device.type}, which has none: leave it out"
        )
    if policy == "full":
        raise TrainingError(
            "capture records the steps of a model that draws channels, and policy 'full' is plain PyTorch: leave it out"
        )
