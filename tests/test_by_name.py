"""Weights of a prepared model by name: parameters that train, between forward passes, for every idiom of PyTorch."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import Grouped, Residual, normal, seeded
from trady.errors import StateError, TradyWarning
from trady.interception.layer import ArmedLayer
from trady.ops.channel_gradient import ChannelGradient
from trady.ops.selected import channel_major

X = normal(4, 3, 9, 9)


def start(build: Callable[[], nn.Module] = Residual, **options: Any) -> tuple[nn.Module, trady.Tuner]:
    model = seeded(build)
    asked = {"budget": "elements:900", "policy": "static-random", "seed": 1, **options}
    return model, trady.prepare(model, X, **asked)


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(X)
    return out.square().sum()


def trained(model: nn.Module, tuner: trady.Tuner) -> dict[str, nn.Parameter]:
    """The weights that have channels which train."""
    return {name: model.get_parameter(tuner.plan.table[name].parameter) for name in tuner.selection}


def compact_of(tuner: trady.Tuner, layer: str) -> nn.Parameter:
    return dict(tuner.named_parameters())[f"{tuner.plan.table[layer].parameter}.channels"]


# -- the gradient --------------------------------------------------------------------------------------


def whole(tuner: trady.Tuner, layer: str, weight: Tensor) -> Tensor:
    """The masked gradient of a layer, put together by hand."""
    row, channels = tuner.plan.table[layer], torch.from_numpy(tuner.selection.channels[layer].copy())
    made = torch.zeros_like(weight, requires_grad=False)
    view, values = channel_major(made, row.kind, row.groups), compact_of(tuner, layer).grad
    assert values is not None
    outputs = tuner.selection.outputs.get(layer)
    for place, channel in enumerate(channels.tolist()):
        group, inside = divmod(channel, view.shape[1])
        target = view[group, inside]
        target[slice(None) if outputs is None else torch.from_numpy(outputs.copy())] = values[place]
    return made


def _channels_last(model: nn.Module) -> nn.Module:
    made: Any = model
    return made.to(memory_format=torch.channels_last)


STARTS: dict[str, Callable[[], tuple[nn.Module, trady.Tuner]]] = {
    "residual": start,
    "grouped": lambda: start(Grouped),
    "channels last": lambda: start(lambda: _channels_last(Residual())),
}


@pytest.mark.parametrize("make", STARTS.values(), ids=STARTS)
def test_the_gradient_of_a_weight_is_the_masked_one_in_its_shape(
    make: Callable[[], tuple[nn.Module, trady.Tuner]],
) -> None:
    model, tuner = make()
    assert all(p.grad is None for p in trained(model, tuner).values())
    loss(model).backward()
    for layer, weight in trained(model, tuner).items():
        gradient = weight.grad
        assert isinstance(gradient, ChannelGradient)
        assert weight.grad is gradient
        assert gradient.shape == weight.shape
        assert gradient.stride() == weight.stride()
        assert torch.equal(gradient.dense(), whole(tuner, layer, weight))
    tuner.finish()


READS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda g: g.norm(), "data.norm(1)": lambda g: g.data.norm(1), "inf": lambda g: g.norm(float("inf")),
    "norm of rows": lambda g: g.norm(dim=0), "zeros": lambda g: torch.linalg.vector_norm(g, 0),
    "least": lambda g: torch.linalg.vector_norm(g, -float("inf")), "mean": lambda g: g.detach().mean(),
    "view": lambda g: g.view(-1)[3:7], "transposed": lambda g: g.transpose(0, 1).flatten(1).sum(0),
    "split": lambda g: torch.cat(g.chunk(2)), "cat": lambda g: torch.cat([g.flatten(), g.flatten()]),
    "cosine": lambda g: F.cosine_similarity(g, g + 1, dim=0), "half": lambda g: g.half(), "list": lambda g: g.tolist(),
    "array": lambda g: g.cpu().numpy(), "repr": repr, "copied": copy.deepcopy, "clone": lambda g: g.clone(),
    "pickled": lambda g: pickle.loads(pickle.dumps(g)), "finite": lambda g: g.isfinite().all(),  # noqa: S301
    "foreach": lambda g: torch._foreach_norm([g, g])[1], "times": lambda g: g * 0.5, "row": lambda g: g.unbind(0)[1],
}  # fmt: skip

WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda g: g.mul_(0.5), "mul_(tensor)": lambda g: g.mul_(torch.tensor(0.5)), "div_": lambda g: g.div_(3.0),
    "mul_ by element": lambda g: g.mul_(torch.arange(g.numel()).view_as(g)), "zero_": lambda g: g.zero_(),
    "clamp_": lambda g: g.clamp_(-0.1, 0.1), "clamp_ above": lambda g: g.clamp_(min=0.2), "neg_": lambda g: g.neg_(),
    "add_": lambda g: g.add_(1.0), "sub_ its mean": lambda g: g.sub_(g.mean()), "item": lambda g: g.__setitem__(0, 7.0),
    "view": lambda g: g.view(-1).mul_(2.0), "part of a view": lambda g: g.transpose(0, 1)[1].fill_(4.0),
    "data": lambda g: g.data.mul_(0.5), "copy_": lambda g: g.copy_(torch.ones_like(g)), "itself": lambda g: g.add_(g),
    "split": lambda g: g.split(1)[1].zero_(), "foreach": lambda g: torch._foreach_mul_([g], 0.5),
    "foreach add": lambda g: torch._foreach_add_([g], [torch.ones_like(g)]), "fill": lambda g: nn.init.ones_(g),
}  # fmt: skip


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_read_of_a_gradient_is_as_of_a_dense_one(read: Callable[[Any], Any]) -> None:
    model, tuner = start()
    loss(model).backward()
    for layer, weight in trained(model, tuner).items():
        found, expected = read(weight.grad), read(whole(tuner, layer, weight))
        if isinstance(expected, Tensor):
            assert type(found) is Tensor or isinstance(found, ChannelGradient)
            torch.testing.assert_close(torch.as_tensor(found.tolist()), torch.as_tensor(expected.tolist()))
        else:
            assert bool(found == expected) if isinstance(expected, (str, list)) else (found == expected).all()
    tuner.finish()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_into_a_gradient_is_in_the_channels(write: Callable[[Any], Any]) -> None:
    model, tuner = start()
    loss(model).backward()
    for layer, weight in trained(model, tuner).items():
        expected = whole(tuner, layer, weight)
        mask = torch.zeros_like(expected)
        values = compact_of(tuner, layer).grad
        assert values is not None
        kept = values.clone()
        values.fill_(1.0)
        mask.copy_(whole(tuner, layer, weight))
        values.copy_(kept)
        write(expected)
        write(weight.grad)
        torch.testing.assert_close(whole(tuner, layer, weight), expected * mask)
        assert compact_of(tuner, layer).grad is values
    tuner.finish()


def test_a_gradient_can_be_put_in_its_place_by_name() -> None:
    model, tuner = start()
    layer, weight = next(iter(trained(model, tuner).items()))
    weight.grad = torch.ones_like(weight)
    assert torch.equal(compact_of(tuner, layer).grad, torch.ones_like(compact_of(tuner, layer)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="give one of the weight's shape"):
        weight.grad = torch.ones(3)
    del weight.grad
    assert compact_of(tuner, layer).grad is None
    tuner.finish()


# -- the graph -----------------------------------------------------------------------------------------


def penalty(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for _, p in model.named_parameters()]).sum()


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_penalty_arrives_together_with_the_gradient_of_the_forward_pass(order: str) -> None:
    model, tuner = start()
    seen: list[str] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient, name=name: seen.append(name))
    both = [penalty(model), loss(model)] if order == "before" else [loss(model), penalty(model)]
    torch.stack(both).sum().backward()
    assert len(seen) == len(set(seen)) > len(tuner.selection)
    tuner.finish()


def test_a_penalty_that_outlives_its_draw_is_refused() -> None:
    model, tuner = start(policy="dynamic-random")
    made = penalty(model)
    tuner.resample(1)
    with pytest.raises((StateError, RuntimeError), match=r"after its channels were drawn again|detached in-place"):
        made.backward()
    tuner.finish()


def test_an_update_a_layer_in_hooks_is_the_step_of_one_optimizer() -> None:
    found = []
    for in_hooks in (True, False):
        model, tuner = start()
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizers = {p: tuner.attach(torch.optim.SGD([p], lr=1e-4)) for p in weights}

        def step(parameter: Any, optimizers: Any = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for p in weights if in_hooks else ():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            loss(model).backward()
            for p in () if in_hooks else weights:
                step(p)
        found.append(tuner.finish().state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_one_warning_where_gradients_were_asked_for_by_name() -> None:
    model, tuner = start()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for p, gradient in zip(weights, torch.autograd.grad(loss(model), weights, allow_unused=True), strict=True):
                p.grad = gradient
            optimizer.step()
    told = [str(each.message) for each in caught if each.category is TradyWarning]
    assert len(told) == 1
    assert re.search(r"none has reached a channel .* for tuner\.parameters\(\)", told[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (torch.optim.SGD, trady.optim.SGD):
            model, tuner = start()
            optimizer = tuner.attach(make(model.parameters(), lr=1e-4))
            for _ in range(2):
                loss(model).backward()
                loss(model)  # for a log
                optimizer.step()
                optimizer.zero_grad()


# -- the parameter -------------------------------------------------------------------------------------


def _fails(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        model(X[:, :2])


def _interrupted(model: nn.Module) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = list(model.children())[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    model(X)


PASSES: dict[str, Callable[[nn.Module], Any]] = {
    "training": lambda model: loss(model).backward(), "no_grad": lambda model: torch.no_grad()(model)(X),
    "inference mode": lambda model: torch.inference_mode()(model)(X), "a failed one": _fails,
    "an interrupted one": _interrupted, "a copy": lambda model: copy.deepcopy(model)(X),
}  # fmt: skip


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_a_weight_is_a_constant_in_a_forward_pass_and_trains_after_it(run: Callable[[nn.Module], Any]) -> None:
    model, tuner = start(recompute="none")
    before = {name: (p, p._version) for name, p in model.named_parameters()}
    flags: list[bool] = []
    some = next(iter(trained(model, tuner).values()))
    first = next(iter(model.children()))
    first.register_forward_hook(lambda *_: flags.append(some.requires_grad))
    run(model)
    assert not any(flags[: len(flags) - (run is PASSES["a copy"])])
    for name, (parameter, version) in before.items():
        assert dict(model.named_parameters())[name] is parameter
        assert parameter._version == version
    for layer, weight in trained(model, tuner).items():
        assert weight.requires_grad
        assert weight.is_leaf
        assert type(weight).__name__ == "Parameter"
        compact_of(tuner, layer).grad = None
        weight.sum().backward()
        gradient = compact_of(tuner, layer).grad
        assert gradient is not None
        assert bool((gradient == 1).all())
    tuner.finish()
    assert all(type(p) is nn.Parameter and p.is_leaf and p.grad_fn is None for p in model.parameters())


def test_copies_are_plain_parameters_with_the_flags_of_the_moment() -> None:
    model, tuner = start()
    weight = next(iter(trained(model, tuner).values()))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        for (name, mine), (_, theirs) in zip(model.named_parameters(), made.named_parameters(), strict=True):
            assert type(theirs) is nn.Parameter, name
            assert theirs.requires_grad == mine.requires_grad
            assert torch.equal(mine, theirs)
    assert str(nn.Parameter(weight.detach())) == str(weight)
    tuner.finish()


def test_a_weight_whose_tuner_is_gone_is_a_plain_one() -> None:
    model, tuner = start()
    weight = next(iter(trained(model, tuner).values()))
    made = weight.square().sum()
    del model, tuner
    gc.collect()
    assert weight.grad is None
    assert type(weight) is nn.Parameter
    weight.requires_grad_(True)
    (2 * weight).sum().backward()
    found: Any = weight.grad
    assert torch.equal(found, torch.full_like(weight, 2.0))
    del made


def test_a_frozen_parameter_that_is_unfrozen_by_name_is_refused() -> None:
    model, tuner = start()
    bias = next(p for name, p in model.named_parameters() if name.endswith("bias") and not p.requires_grad)
    loss(model).backward()
    bias.requires_grad = True
    with pytest.raises(trady.TradyError, match="made trainable after it had been prepared"):
        loss(model)
    bias.requires_grad = False
    loss(model).backward()
    bias.requires_grad = True  # a flag that was set to false is only given back
    loss(model).backward()
    tuner.finish()


def test_a_gradient_from_before_a_model_was_prepared_is_put_aside() -> None:
    model = seeded(Residual)
    loss(model).backward()
    before = {name: p.grad for name, p in model.named_parameters()}
    tuner = trady.prepare(model, X, budget="elements:900", policy="static-random")
    assert all(p.grad is None for p in trained(model, tuner).values())
    loss(model).backward()
    tuner.finish()
    assert all(p.grad is before[name] for name, p in model.named_parameters())


def test_hooks_from_before_a_model_was_prepared_see_gradients_and_stay() -> None:
    model, seen = seeded(Residual), []
    names = {id(p): name for name, p in model.named_parameters()}
    handles = [p.register_hook(lambda g: seen.append(g.shape)) for p in model.parameters()]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(names[id(p)]))
    tuner = trady.prepare(model, X, budget="elements:900", policy="static-random")
    loss(model).backward()
    first = next(iter(trained(model, tuner).values()))
    assert first.shape in seen
    assert names[id(first)] in seen
    handles[0].remove()
    tuner.finish()
    seen.clear()
    model.zero_grad()
    loss(model).backward()
    assert len(seen) == 2 * len(handles) - 1


def test_an_unselected_layer_trains_by_name_and_has_no_gradient() -> None:
    model, tuner = start(budget="elements:200")
    others = [layer for layer in tuner.plan.table if layer.name not in tuner.selection]
    assert others
    penalty(model).backward()
    for layer in others:
        weight = model.get_parameter(layer.parameter)
        assert weight.requires_grad
        assert weight.grad is None
    tuner.finish()


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("when", ["after the step", "before the step"])
@pytest.mark.parametrize("through", ["weights", "channels"])
def test_writes_without_a_version_count_wherever_they_go(
    through: str, when: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        monkeypatch.setattr(ArmedLayer, "_follow_by_parts", ArmedLayer._follow_on_device)
    found = []
    for unseen in (True, False):
        model, tuner = start()
        optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=1e-4, momentum=0.9))
        for _ in range(4):
            loss(model).backward()
            for moment in ("before the step", "after the step"):
                if moment == when:
                    by_name = [p for _, p in model.named_parameters()]
                    for p in by_name if through == "weights" else list(tuner.parameters()):
                        (p.data if unseen else p.detach()).mul_(0.9)
                if moment == "before the step":
                    optimizer.step()
            optimizer.zero_grad()
        loss(model)
        found.append(tuner.finish().state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_plan_and_a_measurement_leave_gradients_as_they_are() -> None:
    model, tuner = start(budget="update:40 KiB", policy="velocity")
    tuner.observe([(X, torch.zeros(4, dtype=torch.int64))], F.cross_entropy)
    loss(model).backward()
    held = {name: compact_of(tuner, name).grad for name in tuner.selection}
    before = {name: gradient.clone() for name, gradient in held.items() if gradient is not None}
    assert before
    assert tuner.plan.table
    with tuner.untouched(), torch.no_grad():
        model(X)
    for name, gradient in before.items():
        now = compact_of(tuner, name).grad
        assert now is held[name]
        assert now is not None
        assert torch.equal(now, gradient)
    tuner.finish()
