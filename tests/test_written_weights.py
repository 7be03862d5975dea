"""Whoever writes into the weights of a prepared model last wins: projections, masks, checkpoints, averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import trady
from trady.ops.selected import channel_major

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(16, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)
        ).double()  # fmt: skip


Write = Callable[[nn.Module], None]
MASKS = {
    name: (torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) > 0.5).double()
    for name, p in network().named_parameters()
}


def own(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in model.named_parameters()]


def clamp_data(model: nn.Module) -> None:
    for p in own(model):
        p.data.clamp_(-0.1, 0.1)


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for p in own(model):
            p.clamp_(-0.1, 0.1)


def max_norm(model: nn.Module) -> None:
    for p in own(model):
        if p.dim() == 2:
            p.data.copy_(p.data.renorm(2, 0, 0.5))


def mask(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.data.mul_(MASKS[name])


def new_data(model: nn.Module) -> None:
    for p in own(model):
        p.data = p.data * 0.9


def vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(own(model)).detach() * 0.9, own(model))


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


WRITES: dict[str, Write] = {
    "nothing": lambda model: None, ".data.clamp_": clamp_data, "clamp_ under no_grad": clamp, "max norm": max_norm,
    "mask": mask, ".data =": new_data, "vector_to_parameters": vector, "load_state_dict": load,
}  # fmt: skip

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5),
}


def reference(
    model: nn.Module, optimizer: torch.optim.Optimizer, selection: dict[str, Tensor], write: Write, when: str
) -> None:
    """Train the plain model, and put back the weights of channels that are not selected."""
    for _ in range(6):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        if when == "before the step":
            write(model)
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in selection:
                    still = torch.ones(p.shape[1], dtype=torch.bool)
                    still[selection[name]] = False
                    p[:, still] = kept[name][:, still]
                elif not name.startswith("4."):
                    p.copy_(kept[name])
        if when == "after the step":
            write(model)


CASES = [(name, when) for name in WRITES for when in ("after the step", "before the step")]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("name", "when"), CASES)
def test_training_goes_on_from_what_was_written(
    name: str, when: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    write = WRITES[name]
    model, plain = network(), network()
    tuner = trady.prepare(
        model, X, budget="elements:400", policy="static-random", loss=lambda output: F.mse_loss(output, Y)
    )
    table = tuner.plan.table
    selection = {table[name].parameter: torch.from_numpy(channels.copy()) for name, channels in tuner.selection.items()}
    assert 0 < sum(map(len, selection.values())) < 36
    optimizer = tuner.attach(make(list(tuner.parameters())))
    for _ in range(6):
        F.mse_loss(model(X), Y).backward()
        if when == "before the step":
            write(model)
        optimizer.step()
        optimizer.zero_grad()
        if when == "after the step":
            write(model)
    reference(plain, make(list(plain.parameters())), selection, write, when)
    tuner.finish()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_an_update_inside_the_backward_pass_starts_from_what_was_written() -> None:
    found = []
    for make in (torch.optim.SGD, trady.optim.SGD):
        model = network()
        tuner = trady.prepare(model, X, budget="elements:400", policy="static-random")
        optimizer = tuner.attach(make(tuner.parameters(), lr=0.05))
        for _ in range(6):
            F.mse_loss(model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
            clamp_data(model)
        found.append(tuner.finish().state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_weight_without_a_gradient_keeps_what_an_average_has_written() -> None:
    model = network()
    tuner = trady.prepare(model, X, budget="elements:100000", policy="static-random")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05, momentum=0.9))
    F.mse_loss(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    first = model.get_parameter("0.weight")
    with torch.no_grad():
        first.fill_(0.25)  # a target network, say, whose weights are averages of another's
    late, early = model[2:], model[:2]
    F.mse_loss(late(early(X).detach()), Y).backward()
    optimizer.step()
    tuner.finish()
    assert torch.equal(first, torch.full_like(first, 0.25))


def test_several_forwards_before_a_backward_stay_valid() -> None:
    model, plain = network(), network()
    tuner = trady.prepare(model, X, budget="elements:400", policy="static-random")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    (F.mse_loss(model(X), Y) + F.mse_loss(model(-X), Y)).backward()
    (F.mse_loss(plain(X), Y) + F.mse_loss(plain(-X), Y)).backward()
    named = dict(tuner.named_parameters())
    for name, channels in tuner.selection.items():
        layer = tuner.plan.table[name]
        dense = plain.get_parameter(layer.parameter).grad
        assert dense is not None
        whole = channel_major(dense, layer.kind, layer.groups).flatten(0, 1)
        torch.testing.assert_close(
            named[f"{layer.parameter}.channels"].grad, whole[torch.from_numpy(channels.copy())], rtol=1e-9, atol=1e-12
        )
    optimizer.step()
    tuner.finish()


def test_stochastic_weight_averages_are_of_the_weights_as_they_are() -> None:
    model = network()
    tuner = trady.prepare(model, X, budget="elements:400", policy="static-random")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    averaged, seen = torch.optim.swa_utils.AveragedModel(model), []
    for _ in range(4):
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, sum(state[name] for state in seen) / 4)
    tuner.finish()
