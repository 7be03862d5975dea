"""Who else writes into weights: projections, averages, checkpoints, target networks; gradients by name; failures."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from benchmarks.habits.networks import X, loss_of, own, perceptron, sgd, train
from benchmarks.habits.row import Rows, Side
from trady.errors import TradyError

ROWS = Rows()


# -- after a step --------------------------------------------------------------------------------------


def _clamp_data(model: nn.Module) -> None:
    for p in own(model):
        p.data.clamp_(-0.2, 0.2)


@torch.no_grad()
def _clamp(model: nn.Module) -> None:
    for p in own(model):
        p.clamp_(-0.2, 0.2)


def _max_norm(model: nn.Module) -> None:
    for p in own(model):
        if p.dim() == 2:
            p.data.copy_(p.data.renorm(2, 0, 0.5))


def _mask(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for p in own(model):
        p.data.mul_(torch.rand(p.shape, generator=generator) > 0.3)


def _new_data(model: nn.Module) -> None:
    for p in own(model):
        p.data = p.data * 0.9


def _vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(own(model)).detach() * 0.9, own(model))


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def _server(model: nn.Module) -> None:
    for value in model.state_dict().values():  # federated averaging writes into the dictionary's tensors
        value.copy_(value * 0.5 + 0.01)


def _numpy(model: nn.Module) -> None:
    for p in own(model):
        p.data.numpy()[...] *= 0.9


_WRITES: dict[str, Callable[[nn.Module], None]] = {
    "p.data.clamp_() (WGAN)": _clamp_data,
    "p.clamp_() under no_grad": _clamp,
    "max norm: p.data.copy_()": _max_norm,
    "pruning: p.data.mul_(mask)": _mask,
    "p.data = …": _new_data,
    "vector_to_parameters": _vector,
    "load_state_dict in the loop": _load,
    "writes into state_dict()'s tensors (a server's average)": _server,
    "writes through NumPy": _numpy,
}


def _writing(write: Callable[[nn.Module], None], make: Callable[[Any], Any]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(make(model.parameters()))
        for _ in range(3):
            train(model, optimizer, 1)
            write(model)
        train(model, optimizer, 1)

    return program


for _name, _write in _WRITES.items():
    ROWS.add(_name)(_writing(_write, lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5)))


@ROWS.add("load_state_dict between backward and step")
def _before_the_step(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        loss_of(model).backward()
        _load(model)
        optimizer.step()
        optimizer.zero_grad()


@ROWS.add("the best weights are kept and loaded at the end")
def _best(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    train(model, optimizer, 2)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    side.result("last", model.get_parameter("2.weight"))
    model.load_state_dict(best)


# -- averages ------------------------------------------------------------------------------------------


@ROWS.add("SWA: AveragedModel and SWALR")
def _swa(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    averaged, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.05)
    for _ in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        schedule.step()
    for name, value in averaged.module.state_dict().items():
        side.result(f"averaged {name}", value)


@ROWS.add("EMA: AveragedModel(multi_avg_fn=get_ema_multi_avg_fn())")
def _ema(side: Side) -> None:
    model = perceptron()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
    for name, value in averaged.module.state_dict().items():
        side.result(f"averaged {name}", value)


@ROWS.add("EMA by hand, swapped in for evaluation and out again")
def _swapped(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    shadow = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        train(model, optimizer, 1)
        for name, value in model.state_dict().items():
            shadow[name].lerp_(value, 0.5)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(shadow)
        with torch.no_grad():
            side.result(f"evaluated {step}", model.eval()(X))
        model.train().load_state_dict(kept)


@ROWS.add("BYOL: a target that is an average, both prepared")
def _target(side: Side) -> None:
    online, target = perceptron(), perceptron()
    tuner = side.prepare(online, X)
    side.prepare(target, X)
    optimizer = tuner.attach(sgd(online.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        with torch.no_grad():
            aim = target(X.flip(1))
        F.mse_loss(online(X), aim + 1).backward()
        optimizer.step()
        with torch.no_grad():
            for (_, mine), (_, theirs) in zip(online.named_parameters(), target.named_parameters(), strict=True):
                theirs.lerp_(mine, 0.1)


@ROWS.add("DQN: a target network, a copy that is overwritten now and then")
def _q_learning(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    target = copy.deepcopy(model)
    optimizer = tuner.attach(torch.optim.RMSprop(model.parameters(), lr=0.01))
    for step in range(4):
        with torch.no_grad():
            aim = 1 + 0.9 * target(X.flip(1)).amax(1)
        optimizer.zero_grad()
        F.smooth_l1_loss(model(X).gather(1, torch.zeros(16, 1, dtype=torch.int64))[:, 0], aim).backward()
        optimizer.step()
        if step % 2:
            target.load_state_dict(model.state_dict())
    side.result("target", target.get_parameter("2.weight"))


# -- gradients that are asked for by name --------------------------------------------------------------


def _asked(get: Callable[[Any, list[Any]], None]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(sgd(tuner.parameters()))
        for _ in range(3):
            get(loss_of(model), list(tuner.parameters()))
            optimizer.step()
            optimizer.zero_grad()

    return program


def _set_grad(loss: Tensor, parameters: list[Any]) -> None:
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = gradient


ROWS.add("loss.backward(inputs=list(tuner.parameters()))")(_asked(lambda loss, p: loss.backward(inputs=p)))
ROWS.add("torch.autograd.grad(loss, tuner.parameters())")(_asked(_set_grad))


@ROWS.add("the gradient of the input beside (adversarial training)")
def _adversarial(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        x = X.clone().requires_grad_()
        (toward,) = torch.autograd.grad(loss_of(model, x), x)
        optimizer.zero_grad()
        loss_of(model, (x + 0.05 * toward.sign()).detach()).backward()
        optimizer.step()


@ROWS.add("second derivatives (a gradient penalty)", refused=r"differentiated a second time \(create_graph=True")
def _penalty(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    x = X.clone().requires_grad_()
    (toward,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    toward.square().sum().backward()
    optimizer.step()


# -- something fails, and training goes on -------------------------------------------------------------


@ROWS.add("a forward pass on a wrong shape fails")
def _wrong_shape(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for _ in range(3):
        with suppress(RuntimeError, TradyError):
            model(X[:, :5])
            raise AssertionError("no error")
        train(model, optimizer, 1)


@ROWS.add("a hook raises in the middle of a forward pass")
def _hook_raises(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    train(model, optimizer, 1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model[2].register_forward_pre_hook(interrupt)
    try:
        train(model, optimizer, 1)
    except KeyboardInterrupt:
        handle.remove()
    train(model, optimizer, 2)


@ROWS.add("a loss that is not finite: the step is skipped")
def _not_finite(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for step in range(4):
        loss = loss_of(model, X * (float("nan") if step == 1 else 1.0))
        optimizer.zero_grad()
        loss.backward()
        if loss.isfinite():
            optimizer.step()


@ROWS.add("prepare a second time is refused, and training goes on")
def _twice(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    side.refused(lambda: side.prepare(model, X), "already")
    train(model, optimizer)


@ROWS.add("finish, and plain training goes on")
def _finished(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    train(model, tuner.attach(sgd(model.parameters())), 2)
    tuner.finish()
    side.result("prepared", model.get_parameter("0.weight"))
    assert len(list(model.parameters())) == len(own(model))
    with torch.no_grad():
        side.result("out", model(X))


# -- state ---------------------------------------------------------------------------------------------


def _resumed(first: str) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(torch.optim.Adam(model.parameters(), lr=0.02))
        train(model, optimizer, 2)
        if side.pick(True, False):  # the plain run goes on where the prepared one is loaded by another
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), tuner.state_dict()], file)
            file.seek(0)
            weights, state, drawn = torch.load(file, weights_only=False)
            model.load_state_dict(perceptron().state_dict())
            tuner.resample(1)
            optimizer = tuner.attach(torch.optim.Adam(model.parameters(), lr=0.5))
            loads = {
                "model": lambda: model.load_state_dict(weights),
                "optimizer": lambda: optimizer.load_state_dict(state),
                "tuner": lambda: tuner.load_state_dict(drawn),
            }
            for name in (first, *(set(loads) - {first})):
                loads[name]()
        train(model, optimizer, 2)

    return program


for _first in ("optimizer", "tuner", "model"):
    ROWS.add(f"state loaded, that of the {_first} first; Adam keeps its momentum")(_resumed(_first))
