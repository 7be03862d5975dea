"""From a model, data and what is asked of the budget to what trains."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from trady.analysis.by_hand import frozen_by_hand
from trady.errors import ModelError
from trady.planning.request import Request
from trady.policies import get_policy
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.training.batch import Loss, cross_entropy, split_batch
from trady.training.data.loaders import Batches
from trady.training.data.looking import largest_of
from trady.training.objective import objective_of, of_output
from trady.training.trainer import FullTrainer, Trainer, TunerTrainer
from trady.tuner.parts import of_batch_statistics
from trady.tuner.tuner import Tuner

#: The policy that means plain PyTorch here: every parameter trains, without tuner or budget.
FULL = "full"


def make_trainer(
    model: nn.Module,
    loader: Batches,
    accelerator: Accelerator,
    request: Request,
    memory: OptimizerMemory,
    loss: Loss | None,
) -> Trainer:
    """Plan for the largest batch and arm the model, or take it as it is where everything trains.

    Args:
        model: The model, on its device.
        loader: The batches that are planned for.
        accelerator: Where it runs.
        request: What is asked of the budget.
        memory: What the optimizer holds.
        loss: In place of the data's own; ``None`` is that.
    """
    if get_policy(request.policy).name == FULL:
        asked = request.micro_batch  # without a budget, "auto" and "most" are the full batch
        frozen = frozen_by_hand(model, request.train, request.freeze)
        return FullTrainer(model, asked if isinstance(asked, int) else None, frozen)
    example, labels = split_batch(send_to_device(largest_of(loader), accelerator.device))
    objective = objective_of(loader, loss)
    if loss is not None:
        request = replace(request, loss=lambda output: loss(output, labels))
    elif objective.loss is not cross_entropy:  # which a plan knows by itself
        request = replace(request, loss=of_output(objective.loss, labels))
    return TunerTrainer(Tuner(request.decide(model, example, optimizer=memory)))


def check_statistics(model: nn.Module) -> None:
    """Refuse micro-batches where a normalisation would use their statistics, not those of the batch.

    Raises:
        ModelError: There is one.
    """
    if (name := of_batch_statistics(model)) is not None:
        raise ModelError(
            f"{name} normalises with the statistics of the batch, which a micro-batch does not have: "
            "train without micro_batch, or with track_running_stats=True"
        )
