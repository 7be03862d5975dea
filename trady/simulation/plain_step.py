"""A training step as PyTorch runs it, without memory: nothing intercepted, whatever requires a gradient trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from trady.memory.live import LiveBytes
from trady.model.batch import Batch, PackedBatch
from trady.model.parameters import own_parameters
from trady.ops.context import simulated_autocast
from trady.quantized.formats import stored_in
from trady.simulation.fake_run import FakeRun
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.simulator import ExampleLoss, form_of, label_count, parts_at_peak, run_backward, surrogate_loss
from trady.trace.answers import Answer
from trady.trace.draws import Draws


@dataclass(frozen=True)
class PlainStep:
    """What a step takes.

    Attributes:
        peak_bytes: The most bytes alive at one time, weights, batch and optimizer state included.
        parts: What the peak is made of, named as in the ledger.
        trained: Elements of the parameters that have got a gradient.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    trained: int


@dataclass(frozen=True)
class Surroundings:
    """What a simulated step is told beside the model and its batch.

    Attributes:
        device: What fake tensors stand for.
        autocast: What forward passes compute in under autocast; ``None`` is without it.
        loss: What the step makes of the output; a cross entropy, or the model's own loss, where none is given.
        answers: To the calls that need values.
        draws: What random numbers are.
        watching: Makes the context for calls on real tensors alone.
        workspace_bytes: What libraries of kernels keep for themselves.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    loss: ExampleLoss | None = None
    answers: tuple[Answer, ...] = ()
    draws: Draws = Draws()  # noqa: RUF009 - frozen
    watching: Callable[[], AbstractContextManager[None]] = nullcontext
    workspace_bytes: int = 0


def simulate_step(model: nn.Module, packed: PackedBatch, optimizer: OptimizerMemory, around: Surroundings) -> PlainStep:
    """Follow the live bytes of a forward pass, a backward pass and an update that is not the first.

    Args:
        model: Without memory, in the mode in which it trains; its gradients are gone afterwards.
        packed: One batch.
        optimizer: What the optimizer takes; one that updates inside the backward pass uses gradients up as they arrive.
        around: What else there is to know.

    """
    live, batch = LiveBytes(), packed.unpack()
    parameters = [parameter for parameter in own_parameters(model) if parameter.requires_grad]
    kept_by_kernels = _register(live, model, batch, around)
    state = torch.empty(optimizer.kept_bytes(map(form_of, parameters)), dtype=torch.uint8, device="meta")
    live.register(state, "optimizer state")
    fake = FakeRun(around.device, live, around.watching, around.answers)
    args, kwargs = batch.arguments
    around.draws.arm([model, batch.inputs])
    with live:
        with fake, simulated_autocast(around.autocast):
            output = model(*args, **kwargs)
        loss: torch.Tensor | None
        labels: torch.Tensor | None = None  # what the user's loss reads beside the batch
        if around.loss is not None:
            with fake, fake.cut(around.loss.samples, batch.samples), simulated_autocast(around.autocast):
                loss = around.loss.of(output)
        else:
            labels = torch.empty(label_count(output), dtype=torch.int64, device="meta")
            loss = surrogate_loss(output)
        del output
        kept = [storage for storage in live.log if storage.death is None]
        if loss is not None and loss.requires_grad:
            with fake:
                run_backward(loss)
        del loss, labels
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        live.register([parameter.grad for parameter in trained if parameter.grad is not None], "gradients")
        torch.empty(optimizer.moment_bytes(map(form_of, trained)), dtype=torch.uint8, device="meta")
        peak, _ = live.highest()
        parts = parts_at_peak(live, kept)
        del kept_by_kernels
    for parameter in trained:
        parameter.grad = None
    return PlainStep(peak, parts, sum(parameter.numel() for parameter in trained))


def simulate_evaluation(model: nn.Module, packed: PackedBatch, around: Surroundings) -> int:
    """Follow the live bytes of a pass without gradients; return the peak, weights and batch included.

    Args:
        model: Without memory, in evaluation mode.
        packed: One batch.
        around: What else there is to know; the loss is not computed.

    """
    live, batch = LiveBytes(), packed.unpack()
    kept_by_kernels = _register(live, model, batch, around)
    args, kwargs = batch.arguments
    around.draws.arm([model, batch.inputs])
    fake = FakeRun(around.device, live, around.watching, around.answers)
    with fake, torch.no_grad(), live, simulated_autocast(around.autocast):
        model(*args, **kwargs)
    del kept_by_kernels
    return live.highest()[0]


def _register(live: LiveBytes, model: nn.Module, batch: Batch, around: Surroundings) -> torch.Tensor:
    """Account for what is there before a pass; what is returned stands for the workspaces, while it is held."""
    quantized = [tensor for module in model.modules() if (found := stored_in(module)) for tensor in found.tensors()]
    live.register([*model.parameters(), *model.buffers(), *quantized], "weights")
    live.register(batch.tensors, "inputs")
    workspaces = torch.empty(around.workspace_bytes, dtype=torch.uint8, device="meta")
    if workspaces.numel():
        live.register([workspaces], "workspaces")
    return workspaces
