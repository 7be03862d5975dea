"""Trainers, and optimizers of theirs, that a budget does not work with: refused before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trady.errors import ModelError, StateError, TrainingError
from trady.model.eager import unwrap_compiled
from trady.model.prepared import refuse_prepared
from trady.tuner.adoption import innermost

#: What a trainer must have to be wrapped.
_NEEDED = (
    "train", "training_step", "compute_loss", "create_optimizer", "_load_from_checkpoint", "_load_best_model",
    "_save_checkpoint", "get_train_dataloader", "add_callback", "accelerator", "args", "model",
)  # fmt: skip


def check_trainer(trainer: Any) -> None:
    """Refuse what is no transformers-like trainer, or has a budget already.

    Raises:
        ModelError: See :func:`refuse_wrappers`, or it is something else.
        StateError: It has one.
    """
    missing = [name for name in _NEEDED if not hasattr(trainer, name)]
    if missing:
        raise ModelError(
            f"a {type(trainer).__name__} is no trainer like those of transformers (it has no {missing[0]}): for "
            "Lightning there is trady.integrations.lightning.TradyCallback, for a loop of your own trady.prepare"
        )
    if "trady" in vars(trainer):
        raise StateError(
            f"this {type(trainer).__name__} has a budget already: call trady.tune once, or make another trainer"
        )
    refuse_wrappers(trainer)


def optimizer_of(trainer: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a trainer that takes the steps.

    Raises:
        StateError: There is none.
        TrainingError: It needs the whole model.
    """
    optimizer = trainer.optimizer
    if optimizer is None or not hasattr(optimizer, "param_groups"):
        raise StateError(
            "create_optimizer() left no torch optimizer in trainer.optimizer, and trady needs it there: let it set "
            "self.optimizer, or hand one over with optimizers=(optimizer, None)"
        )
    inner = innermost(optimizer)
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    if not held.intersection(map(id, trainer.model.parameters())):
        raise StateError(
            "the trainer's optimizer has none of the model's parameters: build it from model.parameters(), or leave it "
            "to TrainingArguments(optim=...)"
        )
    whole = {"rank", "update_proj_gap", "proj_type"} & {key for group in inner.param_groups for key in group}
    if whole or type(inner).__name__ in ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo", "DummyOptim"):
        asked = getattr(trainer.args.optim, "value", trainer.args.optim)
        raise TrainingError(
            f"optim={asked!r} makes its optimizer from the whole model, and under a budget most of it does not "
            "train: choose adamw_torch, sgd or another one over parameters"
        )
    return inner


def refuse_wrappers(trainer: Any) -> None:
    """Refuse what shards, compiles or disturbs what must be whole.

    Raises:
        ModelError: The message says what to take instead.
        StateError: A tuner has its model in its hands.
    """
    args = trainer.args
    for asked, what, instead in (
        (getattr(trainer, "is_deepspeed_enabled", False), "DeepSpeed", "plain or distributed data-parallel training"),
        (getattr(trainer, "is_fsdp_enabled", False), "FSDP", "plain or distributed data-parallel training"),
        (args.n_gpu > 1, "DataParallel over several GPUs", "torchrun, or CUDA_VISIBLE_DEVICES with one of them"),
        (args.torch_compile, "torch_compile", "compiling the model after train()"),
        (args.neftune_noise_alpha is not None, "NEFTune, whose noise cannot be planned", "dropout"),
    ):
        if asked:
            raise ModelError(f"a memory budget does not work with {what}; take {instead}")
    refuse_model(trainer.model)


def refuse_model(model: nn.Module) -> None:
    """Refuse a model that is prepared, compiled, wrapped or sharded already.

    Raises:
        ModelError, StateError: The message says what to do.
    """
    refuse_prepared(model)
    sharded = {type(p).__name__ for p in model.parameters()} & {"DTensor", "FlatParameter"}
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrapped = next((type(module).__name__ for module in model.modules() if isinstance(module, wrappers)), None)
    for found, what, instead in (
        (unwrap_compiled(model) is not model, "a model that is compiled already", "the model, and compile it later"),
        (wrapped is not None, f"a model inside of {wrapped}", "the model itself: the trainer wraps it"),
        (bool(sharded), f"a model in shards ({', '.join(sharded)})", "the whole model, on each device"),
    ):
        if found:
            raise ModelError(f"a memory budget does not work with {what}; take {instead}")
