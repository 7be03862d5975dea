"""What a trainer has made before the model is armed: its optimizer, Accelerate's forward, other processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trady.integrations.example_record import step_from_state, step_to_state
from trady.integrations.recording import Step
from trady.model.eager import unwrap_compiled
from trady.optim.in_backward import update_forms
from trady.process.ranks import processes
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.optimizer_probe import optimizer_memory
from trady.tuner.tuner import Tuner


def take_up(optimizer: torch.optim.Optimizer, tuner: Tuner) -> None:
    """Add what trains and has no flag that says so: quantised weights, and layers that were named.

    Matrices go to the first group, which decays in trainers, vectors to the last one.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights = dict(unwrap_compiled(tuner.model).named_parameters())
    for name, parameter in tuner.named_parameters():
        if id(weights.get(name.removesuffix(".channels"), parameter)) not in held:
            optimizer.param_groups[0 if parameter.dim() > 1 else -1]["params"].append(parameter)


def not_shown(tuner: Tuner, given: Iterable[Tensor]) -> list[nn.Parameter]:
    """Return what trains and is not among parameters, by itself or as the weight whose channels it is."""
    known = {id(p) for p in given}
    weights = dict(unwrap_compiled(tuner.model).named_parameters())
    left = []
    for name, parameter in tuner.named_parameters():
        weight = weights.get(name.removesuffix(".channels"))
        shown = weight is not None and weight.requires_grad and id(weight) in known
        if not shown and id(parameter) not in known:
            left.append(parameter)
    return left


def put_back(optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Give an optimizer the parameters that it had; what it keeps of others goes."""
    kept = {id(p) for group in groups for p in group}
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = parameters
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]


def memory_of_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerMemory:
    """Return what an optimizer takes beside what it updates."""
    parameters: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
    return replace(optimizer_memory(optimizer), in_backward=update_forms([optimizer], list(parameters)))


def largest_of_all(step: Step) -> Step:
    """Agree with the other processes on the largest example: all must draw the same channels."""
    if (count := processes()) == 1:
        return step
    mine = step_to_state(step)
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, (step.example.elements, mine))
    largest = max(range(len(found)), key=lambda rank: found[rank][0])
    if largest == torch.distributed.get_rank() or found[largest][1] is None:
        return step
    device = next((t.device for t in step.example.tensors), torch.device("cpu"))
    return replace(step_from_state(found[largest][1], device), calls=step.calls)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Undo Accelerate's autocast around ``forward`` while a plan is made: the plan has its own."""
    original, patched = vars(model).get("_original_forward"), vars(model).get("forward")
    if original is None or patched is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched
