"""What loops do with weights and gradients by name: regularisers, updates by hand, logs, surgery, frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

import trady
from benchmarks.habits.networks import Text, X, Y, convolutions, images, loss_of, perceptron, sgd, tokens, train
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("weight")]


# -- regularisers --------------------------------------------------------------------------------------


def _orthogonal(model: nn.Module) -> Tensor:
    return torch.stack([(w @ w.T - torch.eye(len(w), dtype=w.dtype)).square().mean() for w in _weights(model)]).sum()


def _group_lasso(model: nn.Module) -> Tensor:
    return torch.stack([w.norm(dim=0).sum() for w in _weights(model)]).sum()


def _spectral(model: nn.Module) -> Tensor:
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in _weights(model)]).sum()


def _similar(model: nn.Module) -> Tensor:
    first, second = model.get_parameter("2.weight"), model.get_parameter("4.weight")
    return F.cosine_similarity(first.mean(0), second.mean(0), dim=0)


_PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "L1 in the loss, by name": lambda model: torch.stack([w.abs().sum() for w in _weights(model)]).sum(),
    "orthogonality: W @ W.T - I": _orthogonal,
    "group lasso: norms of input channels": _group_lasso,
    "a spectral penalty: matrix_norm(W, 2)": _spectral,
    "a penalty that combines two weights": _similar,
    "parameters_to_vector(model.parameters()).norm()": lambda model: parameters_to_vector(model.parameters()).norm(),
    "L2 over a module around the model": lambda model: torch.stack(
        [p.square().sum() for p in nn.ModuleList([model]).parameters()]
    ).sum(),
}


def _penalised(penalty: Callable[[nn.Module], Tensor]) -> Program:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(sgd(model.parameters()))
        for _ in range(3):
            optimizer.zero_grad()
            (loss_of(model) + 0.05 * penalty(model)).backward()
            optimizer.step()

    return program


for _name, _penalty in _PENALTIES.items():
    ROWS.add(_name)(_penalised(_penalty))


def _l2(model: nn.Module) -> Tensor:
    return 0.05 * torch.stack([w.square().sum() for w in _weights(model)]).sum()


@ROWS.add("EWC: Fisher information from p.grad, then a penalty by name")
def _elastic(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    fisher: dict[str, Tensor] = {}
    for x in X.split(4):
        model.zero_grad()
        loss_of(model, x, Y[:4]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                fisher[name] = fisher.get(name, torch.zeros_like(p)) + p.grad.detach() ** 2
    anchor = {name: p.detach().clone() + 0.1 for name, p in model.named_parameters()}
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        for name, p in model.named_parameters():
            if name in fisher:
                loss = loss + 100 * (fisher[name] * (p - anchor[name]) ** 2).sum()
        loss.backward()
        optimizer.step()


@ROWS.add("a penalty on convolutions, and one policy draws others each epoch")
def _drawn(side: Side) -> None:
    model = convolutions()
    tuner = side.prepare(model, images(), policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for epoch in range(3):
        tuner.resample(epoch)
        optimizer.zero_grad()
        (loss_of(model, images(), torch.arange(4) % 3) + _l2(model)).backward()
        optimizer.step()


@ROWS.add("a penalty, everything recomputed")
def _recomputed(side: Side) -> None:
    model, x = Text(), tokens(4, 8)
    tuner = side.prepare(model, x, recompute="all", budget="elements:4000")
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model, x, torch.arange(4) % 3) + _l2(model)).backward()
        optimizer.step()


@ROWS.add("a penalty, an update inside the backward pass: trady.optim.SGD")
def _updated(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(side.pick(trady.optim.SGD, torch.optim.SGD)(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model) + _l2(model)).backward()
        optimizer.step()


@ROWS.add("a penalty before the forward pass, run backward on its own")
def _alone(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        penalty = _l2(model)
        loss_of(model).backward()
        penalty.backward()
        optimizer.step()


@ROWS.add("a penalty, and gradients of tuner.parameters() by name")
def _asked(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for step in range(3):
        optimizer.zero_grad()
        parameters = list(tuner.parameters())
        if step:
            (loss_of(model) + _l2(model)).backward(inputs=parameters)
        else:
            for p, gradient in zip(
                parameters, torch.autograd.grad(loss_of(model) + _l2(model), parameters), strict=True
            ):
                p.grad = gradient
        optimizer.step()


@ROWS.add("a penalty under clamping hooks: p.register_hook() by name")
def _hooked(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model) + _l2(model)).backward()
        optimizer.step()


# -- updates by hand -----------------------------------------------------------------------------------


def _by_hand(update: Callable[[Any], object], model_of: Callable[[], nn.Module] = perceptron) -> Program:
    def program(side: Side) -> None:
        model = model_of()
        x, y = (X, Y) if model_of is perceptron else (images(), torch.arange(4) % 3)
        side.prepare(model, x)
        for _ in range(3):
            loss_of(model, x, y).backward()
            with torch.no_grad():
                for _, p in model.named_parameters():
                    if p.grad is not None:
                        update(p)
                        p.grad = None

    return program


def _sub(p: Any) -> None:
    p -= 0.1 * p.grad


ROWS.add("SGD by hand: p -= lr * p.grad, by name")(_by_hand(_sub))
ROWS.add("SGD by hand: p.data.add_(p.grad, alpha=-lr)")(_by_hand(lambda p: p.data.add_(p.grad, alpha=-0.1)))
ROWS.add("sign SGD by hand, convolutions")(_by_hand(lambda p: p.data.add_(p.grad.sign(), alpha=-0.01), convolutions))


# -- frozen, and unfrozen ------------------------------------------------------------------------------


@ROWS.add("frozen in the middle: p.requires_grad_(False) by name, and trained again")
def _frozen(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    train(model, optimizer, 1)
    model.get_parameter("2.weight").requires_grad_(False)
    before = model.get_parameter("2.weight").detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(before, model.get_parameter("2.weight"))
    model.get_parameter("2.weight").requires_grad = True
    train(model, optimizer, 2)


def _toggled(toggle: Callable[[nn.Module, bool], object]) -> Program:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(sgd(model.parameters()))
        for _ in range(3):
            optimizer.zero_grad()
            toggle(model, False)
            x = X.clone().requires_grad_()
            loss_of(model, x).backward()
            assert all(p.grad is None for p in model.parameters())
            toggle(model, True)
            train(model, optimizer, 1)

    return program


def _set_flags(model: nn.Module, flag: bool) -> None:
    for p in model.parameters():
        p.requires_grad = flag


ROWS.add("GAN: model.requires_grad_(False), then True")(_toggled(lambda model, flag: model.requires_grad_(flag)))
ROWS.add("GAN: p.requires_grad = False, then True")(_toggled(_set_flags))


# -- optimizers ----------------------------------------------------------------------------------------


@ROWS.add("rates by name, set after prepare")
def _rates(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    groups = [{"params": [p], "lr": 0.02 * (n + 1)} for n, (_, p) in enumerate(model.named_parameters())]
    train(model, tuner.attach(torch.optim.SGD(groups, lr=0.1)))


@ROWS.add("add_param_group of a layer, after a step")
def _unfrozen(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model[2:].parameters()))
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.2})
        if step < 2:
            model[0].weight.requires_grad_(False)
        else:
            model[0].weight.requires_grad_(True)
        train(model, optimizer, 1)


@ROWS.add("an optimizer over named weights that was never attached", refused="was never attached")
def _never(side: Side) -> None:
    model = perceptron()
    side.prepare(model, X)
    train(model, sgd([p for _, p in model.named_parameters()]))


# -- a module around the model -------------------------------------------------------------------------


class _Task(nn.Module):
    """A model with its loss, as Lightning has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.loss(self.model(x), y)
        return out


@ROWS.add("LightningModule: loss, decay, zero_grad and clipping of the module around")
def _task(side: Side) -> None:
    model = perceptron()
    tuner, task = side.prepare(model, X), _Task(model)
    optimizer = tuner.attach(sgd(task.parameters()))
    for step in range(4):
        loss = task(X, Y) + 0.05 * sum(p.square().sum() for p in task.parameters())
        loss.backward()
        nn.utils.clip_grad_value_(task.parameters(), 0.02)
        nn.utils.clip_grad_norm_(task.parameters(), 0.05)
        if step != 1:
            optimizer.step()
        task.zero_grad()


# -- written to ----------------------------------------------------------------------------------------


@ROWS.add("an average of another network, .data of parameters and statistics, batch normalisation")
def _averaged(side: Side) -> None:
    model, other = _normalised(), _normalised()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    model[1].eval()
    for _ in range(3):
        train(model, optimizer, 1)
        for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.data.lerp_(theirs + 0.1, 0.2)


def _normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).double()


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.model, x, use_reentrant=False)
        return out


@ROWS.add("a checkpoint around the model, and a penalty")
def _checkpointed(side: Side) -> None:
    model = perceptron()
    tuner, around = side.prepare(model, X), _Checkpointed(model)
    optimizer = tuner.attach(sgd(around.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        (_l2(around) + loss_of(around) + _l2(around)).backward()
        optimizer.step()


@ROWS.add("weights tied by hand: a.weight = b.weight", refused="moved or replaced")
def _tied(side: Side) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3)).double()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    model[0].weight = model[2].weight
    train(model, optimizer)


@ROWS.add("backward(inputs=) of the model's own weights", refused=r"ask for inputs=list\(tuner\.parameters\(\)\)")
def _inputs(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    loss_of(model).backward(inputs=[p for p in model.parameters() if p.requires_grad])
    optimizer.step()
