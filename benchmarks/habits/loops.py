"""What else a loop does with parameters and gradients: penalties, hooks, scalers, norms, checkpoints of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint

from benchmarks.habits.networks import X, Y, loss_of, perceptron, sgd, train
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()


def _loop(step: Callable[[Side, nn.Sequential, Any], None], **options: Any) -> Program:
    """Three times what comes between dropping gradients and the optimizer's step."""

    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X, **options)
        optimizer = tuner.attach(sgd(model.parameters()))
        for _ in range(3):
            optimizer.zero_grad()
            step(side, model, optimizer)
            optimizer.step()

    return program


# -- penalties on weights ------------------------------------------------------------------------------


@ROWS.add("L2 in the loss: sum(p.square().sum() for p in model.parameters())")
@_loop
def _l2(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    (loss_of(model) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()


@ROWS.add("L1 in the loss, over tuner.named_parameters()")
def _l1(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(tuner.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model) + 0.01 * sum(p.abs().sum() for _, p in tuner.named_parameters())).backward()
        optimizer.step()


# -- gradients -----------------------------------------------------------------------------------------


@ROWS.add("p.register_hook(clamp) over model.parameters()")
def _hooks(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    train(model, optimizer)


@ROWS.add("gradients scaled in place: p.grad.mul_() over model.parameters()")
@_loop
def _scaled(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    loss_of(model).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


@ROWS.add("GradScaler: scale, unscale_, clip, step, update")
def _scaler(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


@ROWS.add("two losses, two backward passes: retain_graph=True")
@_loop
def _two_losses(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    out = model(X)
    F.cross_entropy(out, Y).backward(retain_graph=True)
    (0.1 * out.square().mean()).backward()


@ROWS.add("the norm of all gradients, for a log")
@_loop
def _norm(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    loss_of(model).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    side.result("norm", norm)


@ROWS.add("LBFGS(model.parameters())", refused="LBFGS keeps one flat history.*use SGD or AdamW")
def _lbfgs(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


@ROWS.add("the rate by hand: param_groups[0]['lr'] = …, and ReduceLROnPlateau")
def _rate(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    for rate in (0.2, 0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, 1)
        plateau.step(1.0)
    train(model, optimizer, 1)


# -- modes and modules ---------------------------------------------------------------------------------


def _normalised(affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16, affine=affine), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.2),
        nn.LayerNorm(16), nn.Linear(16, 3),
    ).double()  # fmt: skip


@ROWS.add("batch normalisation: as its statistics stand, whatever the mode")
def _batch_norm(side: Side) -> None:
    model = _normalised()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        model.train()
        if side.pick(False, True):
            model[1].eval()
        train(model, optimizer, 1)


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 3)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.body, F.relu(self.first(x)), use_reentrant=False))
        return out


@ROWS.add("torch.utils.checkpoint inside of the model")
def _checkpointed(side: Side) -> None:
    model = _Checkpointed()
    tuner = side.prepare(model, X)
    train(model, tuner.attach(sgd(model.parameters())))


@ROWS.add("a hook that changes an activation")
def _forward_hook(side: Side) -> None:
    model = perceptron()
    model[1].register_forward_hook(lambda module, args, out: out * 0.5)
    tuner = side.prepare(model, X)
    train(model, tuner.attach(sgd(model.parameters())))


# -- a module around the model, writes through .data -----------------------------------------------------


@ROWS.add("clip_grad_norm_() of a module around the model")
@_loop
def _clip_around(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(nn.ModuleList([model]).parameters(), 0.05)


@ROWS.add("a step is skipped, zero_grad() of a module around the model")
def _skipped(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer, around = tuner.attach(sgd(model.parameters())), nn.ModuleList([model])
    for step in range(3):
        loss_of(model).backward()
        if step != 1:
            optimizer.step()
        around.zero_grad()


@ROWS.add("p.data.clamp_() between backward and step")
@_loop
def _data_between(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    loss_of(model).backward()
    for _, p in model.named_parameters():
        p.data.clamp_(-0.1, 0.1)


# -- penalties on weights, by name -----------------------------------------------------------------------


@ROWS.add("L2 in the loss, by name: model.named_parameters()")
@_loop
def _by_name(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    (loss_of(model) + 0.1 * sum(p.square().sum() for _, p in model.named_parameters())).backward()


@ROWS.add("L2 in the loss on one weight: model[2].weight")
@_loop
def _on_one(side: Side, model: nn.Sequential, optimizer: Any) -> None:
    (loss_of(model) + 0.1 * model.get_parameter("2.weight").square().sum()).backward()


@ROWS.add("FedProx: zip(model.parameters(), before.parameters())")
def _proximal(side: Side) -> None:
    model = perceptron()
    before = copy.deepcopy(model)
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        pairs = zip(model.parameters(), before.parameters(), strict=False)
        (loss_of(model) + sum((p - old.detach()).square().sum() for p, old in pairs)).backward()
        optimizer.step()
