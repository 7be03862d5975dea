"""What optimizers are made of, wrapped in and scheduled by; how gradients are dropped and clipped; what is frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR, StepLR

import trady
from benchmarks.habits.networks import X, convolutions, images, loss_of, perceptron, sgd, train
from benchmarks.habits.row import Rows, Side

ROWS = Rows()


# -- what they are made of -----------------------------------------------------------------------------


def _over(make: Callable[[Any], Any], which: Callable[[nn.Module, Any], Iterable[Any]]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        train(model, tuner.attach(make(list(which(model, tuner)))))

    return program


_MAKES: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum, decay and nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "Adam with amsgrad, foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}
for _name, _make in _MAKES.items():
    ROWS.add(f"{_name}(model.parameters())")(_over(_make, lambda model, tuner: model.parameters()))
ROWS.add("AdamW(filter(requires_grad, model.parameters()))")(
    _over(_MAKES["AdamW"], lambda model, tuner: filter(lambda p: p.requires_grad, model.parameters()))
)
ROWS.add("AdamW(p for _, p in model.named_parameters())")(
    _over(_MAKES["AdamW"], lambda model, tuner: [p for _, p in model.named_parameters()])
)
ROWS.add("AdamW(tuner.parameters())")(_over(_MAKES["AdamW"], lambda model, tuner: tuner.parameters()))
ROWS.add("parameters of a module around the model")(
    _over(_MAKES["AdamW"], lambda model, tuner: nn.ModuleList([model]).parameters())
)


@ROWS.add("an optimizer made before prepare")
def _made_before(side: Side) -> None:
    model = convolutions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tuner = side.prepare(model, images())
    train(model, tuner.attach(optimizer), x=images(), y=torch.arange(4) % 3)


@ROWS.add("an update inside the backward pass: trady.optim.SGD")
def _in_backward(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    train(model, tuner.attach(side.pick(trady.optim.SGD, torch.optim.SGD)(model.parameters(), lr=0.1)))


@ROWS.add("two optimizers: one of the body, one of the head")
def _two_optimizers(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    first = tuner.attach(sgd(model[:-1].parameters()))
    second = tuner.attach(torch.optim.Adam(model[-1].parameters(), lr=0.01))
    for _ in range(3):
        loss_of(model).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()


@ROWS.add("two optimizers, that of the body steps every second time")
def _body_rarely(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    head, body = tuner.attach(sgd(model[-1].parameters())), tuner.attach(sgd(model[:-1].parameters()))
    for step in range(4):
        loss_of(model).backward()
        head.step()
        head.zero_grad()
        if step % 2:
            body.step()
            body.zero_grad()


@ROWS.add("rates by layer, biases and norms without decay")
def _groups(side: Side) -> None:
    model = convolutions()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named["0.weight"]], "lr": 0.001},
            {"params": [named["3.weight"], named["5.weight"]], "lr": 0.01, "weight_decay": 0.5},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
            {"params": [named["9.weight"]], "lr": 0.1},
        ],
        lr=0.02,
    )
    tuner = side.prepare(model, images())
    train(model, tuner.attach(optimizer), x=images(), y=torch.arange(4) % 3)


@ROWS.add("add_param_group after a step")
def _added_group(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    channels = [p for name, p in tuner.named_parameters() if not name.startswith("4.")]
    optimizer = tuner.attach(sgd(channels))
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": list(model[-1].parameters()), "lr": 0.3})
    train(model, optimizer, 2)


# -- schedulers ----------------------------------------------------------------------------------------

_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 1, gamma=0.5),
    "warm-up, then cosine": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda step: (step + 1) / 2), CosineAnnealingLR(optimizer, 3)], [1]
    ),
    "OneCycleLR, which moves momentum too": lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=4),
}


def _scheduled(make: Callable[[Any], Any]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        optimizer = sgd(model.parameters())
        scheduler = make(optimizer)
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(optimizer)
        for _ in range(3):
            train(model, optimizer, 1)
            scheduler.step()

    return program


for _name, _make in _SCHEDULERS.items():
    ROWS.add(f"{_name}, made before attach")(_scheduled(_make))


# -- wrappers ------------------------------------------------------------------------------------------


class _Around(torch.optim.Optimizer):
    """Accelerate's way: an optimizer that holds one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


@ROWS.add("a wrapper around the optimizer (Accelerate)")
def _wrapped(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    train(model, tuner.attach(_Around(torch.optim.AdamW(model.parameters(), lr=0.01))))


@ROWS.add("Lookahead: slow weights every second step")
def _lookahead(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    slow = [p.detach().clone() for _, p in model.named_parameters()]
    for step in range(4):
        train(model, optimizer, 1)
        if step % 2:
            for (_, p), s in zip(model.named_parameters(), slow, strict=True):
                s.add_(p.data - s, alpha=0.5)
                p.data.copy_(s)


@ROWS.add("SAM: up the gradient, a second pass, back, and a step")
def _sharpness(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        loss_of(model).backward()
        moved: list[tuple[Any, Any]] = []
        with torch.no_grad():
            held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in held]).norm()
            for p in held:
                moved.append((p, p.grad * (0.05 / norm)))
                p.add_(moved[-1][1])
        optimizer.zero_grad()
        loss_of(model).backward()
        with torch.no_grad():
            for p, up in moved:
                p.sub_(up)
        optimizer.step()
        optimizer.zero_grad()


@ROWS.add("optimizer.step(closure)")
def _closure(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


# -- what cannot be ------------------------------------------------------------------------------------


@ROWS.add("an optimizer that was never attached", refused=r"was never attached: call optimizer = tuner\.attach")
def _never_attached(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    train(model, sgd(tuner.parameters()))


@ROWS.add("an optimizer of the head alone", refused=r"no optimizer that is attached updates the channels of")
def _head_alone(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    train(model, tuner.attach(sgd(model[-1].parameters())))


@ROWS.add("an optimizer of another model, refused; then training goes on")
def _of_another(side: Side) -> None:
    model, other = perceptron(), perceptron()
    tuner = side.prepare(model, X)
    side.refused(lambda: tuner.attach(sgd(other.parameters())), "none of the tuner's parameters")
    train(model, tuner.attach(sgd(model.parameters())))


# -- gradients are dropped and clipped -----------------------------------------------------------------


def _to_none(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def _to_zero(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


_DROPS: dict[str, Callable[[nn.Module], Any]] = {
    "model.zero_grad()": lambda model: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model: model.zero_grad(set_to_none=False),
    "for p in model.parameters(): p.grad = None": _to_none,
    "for p in model.parameters(): p.grad.zero_()": _to_zero,
    "zero_grad() of a module around the model": lambda model: nn.ModuleList([model]).zero_grad(),
}


def _dropping(drop: Callable[[nn.Module], Any]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(sgd(tuner.parameters()))
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
            drop(model)

    return program


for _name, _drop in _DROPS.items():
    ROWS.add(_name)(_dropping(_drop))


_CLIPS: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_norm_(model.parameters())": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
    "clip_grad_norm_(…, inf norm)": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.02, float("inf")),
    "clip_grad_value_(model.parameters())": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
}


def _clipping(clip: Callable[[nn.Module], Any]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.5))
        for _ in range(3):
            loss_of(model).backward()
            before = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
            clip(model)
            after = [p.grad for p in model.parameters() if p.grad is not None]
            assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing was clipped"
            optimizer.step()
            optimizer.zero_grad()

    return program


for _name, _clip in _CLIPS.items():
    ROWS.add(_name)(_clipping(_clip))


# -- frozen --------------------------------------------------------------------------------------------


def _held(options: dict[str, Any], flags: Callable[[nn.Sequential], Any] | None = None) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        if flags is not None:
            flags(model)
        before = copy.deepcopy(model[0].state_dict())
        tuner = side.prepare(model, X, **options)
        train(model, tuner.attach(sgd(model.parameters())))
        assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items()), "0 has trained"

    return program


ROWS.add("requires_grad_(False) before prepare")(_held({}, lambda model: model[0].requires_grad_(False)))
ROWS.add("the last layer frozen too")(
    _held({}, lambda model: [model[0].requires_grad_(False), model[4].requires_grad_(False)])
)
ROWS.add('train="2"')(_held({"train": "2"}))
ROWS.add("a layer that does not exist: freeze=", refused=r"freeze='encoder' matches no parameter")(
    _held({"freeze": "encoder"})
)


@ROWS.add("freeze=model[0]")
def _frozen_module(side: Side) -> None:
    model = perceptron()
    first = model.get_parameter("0.weight")
    before = first.detach().clone()
    tuner = side.prepare(model, X, freeze=model[0])
    train(model, tuner.attach(sgd(model.parameters())))
    assert torch.equal(before, first), "0 has trained"
