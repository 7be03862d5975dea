"""How the cells of a matrix are trained: the arguments of ``trady.finetune`` that a matrix file can give."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trady.compare.names import Names
from trady.training.settings import OBSERVED_BATCHES

#: A limit that can be switched off; TOML has no null.
Limit = Annotated[float, Field(gt=0)] | Literal[False]
Count = Annotated[int, Field(ge=1)]


class Training(BaseModel):
    """Table ``[training]``. The defaults are those of ``trady finetune``.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        lr: Learning rate at the end of the warm-up; by default that of the optimizer, the same for all policies.
        warmup_epochs: Length of the warm-up; a tenth of the run where it is not given.
        channel_clip: Limit of a channel's gradient norm over the channel's own, or ``auto``; ``false`` does not clip.
        max_grad_norm: Limit of the head's gradient norm; ``false`` does not clip.
        optimizer: By name.
        momentum: For ``sgd``.
        weight_decay: For every optimizer.
        mode: Dropout in training: on (``train``) or off (``eval``).
        mixed_precision: ``no`` or ``bf16``.
        recompute: What is recomputed in the backward pass.
        micro_batch: Images a forward and backward pass, ``auto`` or ``most``.
        image_size: Height and width; the model's own where it is not given.
        train_limit: Maximum number of images to train on, drawn with the seed.
        evaluation_limit: Maximum number of images to evaluate on.
        ranking: Of the layers, for the policies that use one: ``online``, ``structural``, or a file that ``trady
            rank`` has written. By default the shipped prior of the structure, else ``online``. A user's own
            prior is not used, since another machine might have another one: name its file.
        scheme: A file that ``trady search`` has written, for the policy ``sparse-update``.
        observed_batches: Batches that policies are measured on if they measure before they draw.
        fidelity: How exactly smooth activations are differentiated.
        draws_per_epoch: How often channels are drawn in an epoch.
        augment: How training images are varied.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    epochs: Count = 5
    batch_size: Count = 32
    lr: float | None = Field(default=None, gt=0)
    warmup_epochs: float | None = Field(default=None, ge=0)
    channel_clip: Limit | Literal["auto"] = "auto"
    max_grad_norm: Limit = 2.0
    optimizer: Literal["sgd", "adam", "adamw", "sgd-in-backward", "adamw-in-backward"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    mode: Literal["train", "eval"] = "train"
    mixed_precision: Literal["no", "bf16"] = "no"
    recompute: Literal["auto", "all", "none"] = "auto"
    micro_batch: Count | Literal["auto", "most"] | None = None
    image_size: Count | None = None
    train_limit: Count | None = None
    evaluation_limit: Count | None = None
    ranking: Names.Ranking | None = None
    scheme: Names.Scheme | None = None
    observed_batches: Count = OBSERVED_BATCHES
    fidelity: Literal["exact", "8bit", "4bit"] = "exact"
    draws_per_epoch: Count = 1
    augment: Literal["none", "light", "paper"] = "none"

    def given(self) -> dict[str, Any]:
        """Return the settings that the file has, without the defaults."""
        return {name: getattr(self, name) for name in Training.model_fields if name in self.model_fields_set}
