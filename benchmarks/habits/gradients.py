"""What loops do with gradients by name: ``p.grad`` over ``model.named_parameters()``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.habits.networks import X, Y, loss_of, perceptron, sgd
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()


# -- gradients -----------------------------------------------------------------------------------------


def _changing(change: Callable[[nn.Module], object]) -> Program:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(sgd(model.parameters()))
        for _ in range(3):
            loss_of(model).backward()
            change(model)
            optimizer.step()
            optimizer.zero_grad()

    return program


def _graded(model: nn.Module) -> list[Any]:
    return [p for _, p in model.named_parameters() if p.grad is not None]


def _each(change: Callable[[Any], object]) -> Callable[[nn.Module], object]:
    return lambda model: [change(p) for p in _graded(model)]


def _unscale(p: Any) -> None:
    p.grad.div_(8.0).mul_(torch.tensor(4.0))


def _centralise(p: Any) -> None:
    if p.dim() > 1:
        p.grad.sub_(p.grad.mean(1, keepdim=True))


def _adaptive(p: Any) -> None:
    norm = p.grad.norm(dim=-1, keepdim=True)
    limit = 0.01 * p.detach().norm(dim=-1, keepdim=True)
    p.grad.copy_(torch.where(norm > limit, p.grad * limit / norm.clamp_min(1e-6), p.grad))


def _rows(p: Any) -> None:
    p.grad[1] = 0
    p.grad.view(-1)[:5].mul_(3.0)


def _noise(p: Any) -> None:
    p.grad.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype), alpha=0.1)


def _decay(p: Any) -> None:
    p.grad.add_(p.data, alpha=0.5)


def _assign(p: Any) -> None:
    p.grad = p.grad.clone() * 0.5 + 0.01 * p.detach()


def _times(p: Any) -> None:
    p.grad *= 0.5


def _foreach(model: nn.Module) -> None:
    gradients = [p.grad for p in _graded(model)]
    torch._foreach_mul_(gradients, 0.5)
    torch._foreach_add_(gradients, [p.detach() for p in _graded(model)], alpha=0.1)


def _vector(model: nn.Module) -> None:
    flat = torch.cat([p.grad.view(-1) for p in _graded(model)])
    flat = flat / flat.norm()
    for p, part in zip(_graded(model), flat.split([p.numel() for p in _graded(model)]), strict=True):
        p.grad = part.view_as(p)


for _name, _change in {
    "unscaled by hand: p.grad.div_(scale)": _each(_unscale),
    "p.grad.data *= 0.5 by name": _each(_times),
    "gradient centralisation: p.grad.sub_(p.grad.mean())": _each(_centralise),
    "adaptive clipping by rows": _each(_adaptive),
    "rows of p.grad, and views of it, written to": _each(_rows),
    "noise added to p.grad": _each(_noise),
    "decay by hand: p.grad.add_(p.data)": _each(_decay),
    "p.grad = another tensor": _each(_assign),
    "torch._foreach_ over [p.grad]": _foreach,
    "all gradients as one vector, and back": _vector,
    "clip_grad_norm_(by name, foreach=True)": lambda model: nn.utils.clip_grad_norm_(
        [p for _, p in model.named_parameters()], 0.05, foreach=True
    ),
}.items():
    ROWS.add(_name)(_changing(_change))


@ROWS.add("gradient surgery (PCGrad): two losses, p.grad by name")
def _surgery(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        found = []
        for y in (Y, (Y + 1) % 3):
            optimizer.zero_grad()
            loss_of(model, y=y).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        one, other = found
        dot, square = (torch.stack([(a * b[n]).sum() for n, a in one.items()]).sum() for b in (other, one))
        for name, p in model.named_parameters():
            if name in one:
                p.grad = other[name] + one[name] - one[name] * (dot / square).clamp_max(0)
        optimizer.step()


@ROWS.add("a log of gradients: norms, means, histograms, by name")
def _log(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                side.result(f"norm {name} {step}", p.grad.data.norm(2))
                side.result(f"mean {name} {step}", p.grad.detach().abs().mean())
                side.result(f"histogram {name} {step}", torch.histc(p.grad.cpu(), 5))
                side.result(f"array {name} {step}", torch.tensor(p.grad.detach().cpu().numpy()))
                side.result(f"deep {name} {step}", copy.deepcopy(p.grad))
                assert p.grad.shape == p.shape
                assert not torch.isnan(p.grad).any()
                assert "tensor" in str(p.grad)
        optimizer.step()


@ROWS.add("SAM over the model's own parameters, by name")
def _sharpness(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        loss_of(model).backward()
        moved = []
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in _graded(model)]).norm()
            for p in _graded(model):
                moved.append((p, p.grad * (0.05 / norm)))
                p.add_(moved[-1][1])
        model.zero_grad()
        loss_of(model).backward()
        with torch.no_grad():
            for p, up in moved:
                p.sub_(up)
        optimizer.step()
        optimizer.zero_grad()


@ROWS.add("gradients added up by hand: sums of p.grad.clone()")
def _added(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(2):
        sums: dict[str, Tensor] = {}
        for x in X.split(8):
            optimizer.zero_grad()
            loss_of(model, x, Y[:8]).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    sums[name] = sums.get(name, torch.zeros_like(p)) + p.grad
        for name, p in model.named_parameters():
            if p.grad is not None:
                p.grad.copy_(sums[name])
        optimizer.step()
