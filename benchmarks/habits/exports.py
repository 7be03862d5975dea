"""A prepared model is used: evaluated, copied, saved, exported, called by name. Then training goes on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.habits.networks import Text, X, convolutions, images, loss_of, perceptron, sgd, tokens, train
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()

Way = Callable[[Any, Tensor], Tensor]


def _between(way: Way, **options: Any) -> Program:
    """Train, use the model, train on."""

    def program(side: Side) -> None:
        model, x, y = convolutions(), images(), torch.arange(4) % 3
        tuner = side.prepare(model, x, **{"recompute": "all", **options})
        optimizer = tuner.attach(sgd(model.parameters()))
        for step in range(2):
            train(model, optimizer, 1, x, y)
            model.eval()
            with torch.no_grad():
                side.result(f"out {step}", way(model, x))
            model.train()
        train(model, optimizer, 1, x, y)

    return program


def _pickled(model: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    out: Tensor = torch.load(file, weights_only=False)(x)
    return out


def _loaded(model: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = convolutions()
    other.load_state_dict(torch.load(file))
    out: Tensor = other(x)
    return out


def _by_name(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(model, {n: v * 0.5 for n, v in model.state_dict().items()}, (x,))
    return out


def _features(model: nn.Module, x: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model[5].register_forward_hook(lambda module, args, out: kept.append(out.clone()))  # type: ignore[index]
    model(x)
    handle.remove()
    return kept[0]


_WAYS: dict[str, Way] = {
    "evaluation in the middle: model.eval(), no_grad": lambda model, x: model(x),
    "torch.inference_mode()": lambda model, x: torch.inference_mode()(model)(x).clone(),
    "prediction on one sample, another size": lambda model, x: model(x[:1].repeat(1, 1, 2, 2)),
    "copy.deepcopy(model)": lambda model, x: copy.deepcopy(model)(x),
    "torch.save(model)": _pickled,
    "state_dict saved, and loaded by a plain model": _loaded,
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x)(x),
    "torch.fx.symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "functional_call with other weights": _by_name,
    "torch.vmap": lambda model, x: torch.vmap(lambda one: model(one.unsqueeze(0)).squeeze(0))(x),
    "features by a forward hook": _features,
    "a part of the model: model[:6](x)": lambda model, x: model[:6](x),
}
for _name, _way in _WAYS.items():
    ROWS.add(f"{_name}; training goes on")(_between(_way))


@ROWS.add("a greedy generate() loop in the middle")
def _generate(side: Side) -> None:
    model, x, y = Text(), tokens(4, 8), torch.arange(4) % 3
    tuner = side.prepare(model, x, recompute="all", budget="elements:4000")
    optimizer = tuner.attach(sgd(model.parameters()))
    for step in range(2):
        train(model, optimizer, 1, x, y)
        ids = x[:1, :2]
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model.eval()(ids).argmax(-1, keepdim=True)], 1)
        model.train()
        side.result(f"generated {step}", ids)


@ROWS.add("validation loss with gradients on, never run backward")
def _validated(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    for step in range(3):
        train(model, optimizer, 1)
        side.result(f"loss {step}", loss_of(model, X.flip(0)))


@ROWS.add("print(model), names, the number of parameters: as of the plain model")
def _shown(side: Side) -> None:
    model = perceptron()
    shown, names = str(model), [name for name, _ in model.named_parameters()]
    count = sum(p.numel() for p in model.parameters())
    tuner = side.prepare(model, X)
    assert str(model) == shown
    assert [name for name, _ in model.named_parameters()] == names
    assert sum(p.numel() for p in model.parameters()) == count
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name.removesuffix(".channels") for name, _ in tuner.named_parameters()}
    train(model, tuner.attach(sgd(model.parameters())))


@ROWS.add("torch.jit.script", refused=r"torch\.jit\.script was called with a prepared model: call tuner\.finish\(\)")
def _scripted(side: Side) -> None:
    model = perceptron()
    side.prepare(model, X)
    torch.jit.script(model)


@ROWS.add("torch.vmap over a training pass", refused=r"torch\.func's vmap, grad and the like were put around")
def _mapped(side: Side) -> None:
    model = perceptron()
    side.prepare(model, X)
    torch.vmap(lambda x: model(x.unsqueeze(0)).squeeze(0))(X)


@ROWS.add("functional_call with gradients", refused=r"moved or replaced after the model had been prepared")
def _called_by_name(side: Side) -> None:
    model = perceptron()
    side.prepare(model, X)
    torch.func.functional_call(model, dict(model.state_dict()), (X,))


@ROWS.add("model.float() while it is prepared")
def _moved(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    optimizer = tuner.attach(sgd(model.parameters()))
    train(model, optimizer, 1)
    model.float()
    optimizer.state.clear()
    train(model, optimizer, 3, X.float())


@ROWS.add("an epoch's draw: tuner.resample(epoch)")
def _redrawn(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, X, policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for epoch in range(4):
        tuner.resample(epoch)
        train(model, optimizer, 1)
