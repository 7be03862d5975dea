"""Training loops as people write them: every idiom trains what ``tuner.parameters()`` trains, to the same weights."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.idioms import OPTIMIZERS, ZEROS, Wrapper, Zero
from tests.models import Residual, seeded
from tests.tuned import data
from trady.errors import BudgetError, StateError

Make = Callable[[nn.Module, trady.Tuner], torch.optim.Optimizer]


def start(**options: Any) -> tuple[nn.Module, trady.Tuner]:
    model = seeded(Residual)
    asked = {"budget": "elements:1500", "policy": "dynamic-random", "seed": 1, **options}
    return model, trady.prepare(model, data()[0][0], **asked)


def loop(
    model: nn.Module,
    tuner: trady.Tuner,
    optimizer: torch.optim.Optimizer,
    zero: Zero = lambda model, optimizer: optimizer.zero_grad(),
    clip: Callable[[nn.Module], Any] | None = None,
    caller: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Train two epochs; return the weights of the finished model."""
    for epoch in range(2):
        tuner.resample(epoch)
        for x, y in data()[:4]:
            F.cross_entropy((caller or model)(x), y).backward()
            if clip is not None:
                clip(model)
            optimizer.step()
            zero(caller or model, optimizer)
    return {name: value.clone() for name, value in tuner.finish().state_dict().items()}


def reference(make: Callable[[Any], torch.optim.Optimizer], **options: Any) -> dict[str, Tensor]:
    model, tuner = start()
    return loop(model, tuner, tuner.attach(make(list(tuner.parameters()))), **options)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def trained(weights: dict[str, Tensor]) -> set[str]:
    before = seeded(Residual).state_dict()
    return {name for name, value in weights.items() if not torch.equal(value, before[name])}


PARAMETERS: dict[str, Callable[[nn.Module, trady.Tuner], Iterator[nn.Parameter]]] = {
    "all": lambda model, tuner: model.parameters(),
    "those that require a gradient": lambda model, tuner: (p for p in model.parameters() if p.requires_grad),
    "by name": lambda model, tuner: (p for _, p in model.named_parameters()),
    "without those it shows": lambda model, tuner: (p for _, p in model.named_parameters()),
    "of a module around it": lambda model, tuner: Wrapper(model).parameters(),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_an_optimizer_over_the_models_parameters_trains_the_channels(
    parameters: Callable[[nn.Module, trady.Tuner], Iterator[nn.Parameter]],
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model, tuner = start()
    found = loop(model, tuner, tuner.attach(make(list(parameters(model, tuner)))))
    assert len(trained(found)) > 3
    # The order in which parameters are listed may change the order of sums in fused kernels, not more.
    expected = reference(make)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_made_before_the_model_was_prepared_trains_the_channels(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model = seeded(Residual)
    optimizer = make(list(model.parameters()))
    tuner = trady.prepare(model, data()[0][0], budget="elements:1500", policy="dynamic-random", seed=1)
    found = loop(model, tuner, tuner.attach(optimizer))
    for name, value in reference(make).items():
        torch.testing.assert_close(value, found[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_gradients_are_dropped_by_every_idiom(zero: Zero) -> None:
    model, tuner = start()
    make = OPTIMIZERS["momentum"]
    same(loop(model, tuner, tuner.attach(make(list(tuner.parameters()))), zero), reference(make))


@pytest.mark.parametrize("zero", ["model.zero_grad()", "p.grad = None"])
def test_gradients_are_dropped_through_a_module_around_the_model(zero: str) -> None:
    model, tuner = start()
    make, around = OPTIMIZERS["momentum"], Wrapper(model)
    optimizer = tuner.attach(make(list(tuner.parameters())))
    same(loop(model, tuner, optimizer, ZEROS[zero], caller=around), reference(make))


def test_accumulated_gradients_are_kept() -> None:
    def accumulate(pause: Callable[[nn.Module], object]) -> dict[str, Tensor]:
        model, tuner = start()
        optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
        for x, y in data()[:4]:
            for part in (slice(0, 2), slice(2, 4)):
                F.cross_entropy(model(x[part]), y[part]).backward()
                pause(model)
            optimizer.step()
            optimizer.zero_grad()
        return tuner.finish().state_dict()

    same(accumulate(lambda model: None), accumulate(lambda model: model(data()[0][0])))


def test_clipping_the_models_parameters_clips_the_channels() -> None:
    model, tuner = start()
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    x, y = data()[0]
    (100 * F.cross_entropy(model(x), y)).backward()
    before = nn.utils.get_total_norm([p.grad for p in tuner.parameters() if p.grad is not None])
    told = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    after = nn.utils.get_total_norm([p.grad for p in tuner.parameters() if p.grad is not None])
    assert float(told) == pytest.approx(float(before))
    assert float(after) == pytest.approx(0.5, rel=1e-4)
    tuner.finish()


def test_groups_keep_their_rates_decay_and_places() -> None:
    model = seeded(Residual)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    early, late = names[: len(names) // 2], names[len(names) // 2 :]
    groups = [
        {"params": [model.get_parameter(name) for name in early], "lr": 0.01, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.5},
        {"params": [model.get_parameter(name) for name in late], "lr": 0.1, "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    tuner = trady.prepare(model, data()[0][0], budget="elements:1500", policy="dynamic-random")
    assert tuner.attach(optimizer) is optimizer
    mine = dict(tuner.named_parameters())
    place = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01, 0.2]
    for number, members in ((0, early), (2, late)):
        for name in members:
            parameter = mine.get(f"{name}.channels", mine.get(name))
            assert parameter is not None
            assert place[id(parameter)] == number
    assert len(place) == len(mine), "nothing that is frozen stays, nothing is there twice"
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    tuner.finish()


class Around(torch.optim.Optimizer):
    """A wrapper like Accelerate's: an optimizer that holds one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_a_wrapped_optimizer_is_attached_by_the_one_inside() -> None:
    model, tuner = start()
    make = OPTIMIZERS["AdamW"]
    wrapped = Around(make(list(model.parameters())))
    assert tuner.attach(wrapped) is wrapped
    found = loop(model, tuner, wrapped)
    for name, value in reference(make).items():
        torch.testing.assert_close(value, found[name], rtol=1e-6, atol=1e-7)


def test_a_step_that_would_leave_channels_untrained_is_refused_and_names_them() -> None:
    model, tuner = start()
    optimizer = tuner.attach(torch.optim.SGD(model.get_submodule("head").parameters(), lr=0.1))
    x, y = data()[0]
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        StateError, match=r"no optimizer that is attached updates the channels of \w+.*tuner.parameters"
    ):
        optimizer.step()
    channels = tuner.attach(torch.optim.SGD([p for n, p in tuner.named_parameters() if n.endswith("channels")], lr=0.1))
    optimizer.step()
    channels.step()
    tuner.finish()


def test_an_optimizer_that_was_never_attached_is_noticed_at_its_first_step() -> None:
    model, tuner = start()
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    x, y = data()[0]
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        StateError, match=r"this SGD updates channels and was never attached: call optimizer = tuner.att"
    ):
        optimizer.step()
    tuner.attach(optimizer)
    optimizer.step()
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    stranger.step()
    tuner.finish()
    optimizer = torch.optim.SGD(tuner.model.parameters(), lr=0.1)
    optimizer.step()


def test_an_optimizer_of_another_model_is_refused_and_left_as_it_was() -> None:
    _, tuner = start()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(StateError, match="none of the tuner's parameters"):
        tuner.attach(optimizer)
    assert optimizer.param_groups[0]["params"] == list(other.parameters())
    assert len(optimizer.state) == 2
    tuner.finish()


def test_an_optimizer_whose_state_does_not_fit_is_left_as_it_was() -> None:
    model = seeded(Residual)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = [list(group["params"]) for group in optimizer.param_groups]
    least = 0
    for kilobytes in range(1, 100):  # the smallest budget that the model can be prepared in has no room for Adam
        try:
            tuner = trady.prepare(model, data()[0][0], budget=f"update:{kilobytes * 50} B", policy="dynamic-random")
        except BudgetError:
            continue
        least = kilobytes
        break
    assert least
    with pytest.raises(BudgetError):
        tuner.attach(optimizer)
    assert [list(group["params"]) for group in optimizer.param_groups] == before
    tuner.finish()


# -- what the model shows ----------------------------------------------------------------------------


def test_a_prepared_model_has_its_own_names_and_parameters() -> None:
    plain = seeded(Residual)
    model, tuner = start()
    names = [name for name, _ in plain.named_parameters()]
    trains = {name.removesuffix(".channels") for name, _ in tuner.named_parameters()}
    assert [name for name, _ in model.named_parameters()] == names
    assert list(map(id, model.parameters())) == [id(p) for _, p in model.named_parameters()]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert str(model) == str(plain)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.load_state_dict(plain.state_dict())
    assert len(list(model.parameters(recurse=False))) == len(list(plain.parameters(recurse=False)))
    tuner.finish()
    assert len(list(model.parameters())) == len(names)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in model.parameters())
    assert all("parameters" not in module.__dict__ for module in model.modules())


def test_what_is_kept_by_name_is_found_by_name() -> None:
    model, tuner = start()
    masks = {name: torch.ones_like(p) for name, p in seeded(Residual).named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.mul_(masks[name])
    tuner.finish()


def test_copies_and_pickles_of_a_prepared_model_have_their_own_parameters_alone() -> None:
    model, tuner = start()
    count = len(list(seeded(Residual).parameters()))
    copied = copy.deepcopy(model)
    assert len(list(copied.parameters())) == count
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(next(iter(averaged.module.parameters())), next(iter(model.parameters())))
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - made here
    assert len(list(again.parameters())) == count
    tuner.finish()


def test_a_ledger_counts_weights_and_channels_once() -> None:
    model, tuner = start()
    x, y = data()[0]
    optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    ledger = tuner.ledger(step)
    plain = seeded(Residual)
    assert ledger.weight_bytes == sum(t.nbytes for t in (*plain.parameters(), *plain.buffers()))
    tuner.finish()


def test_a_tuner_that_is_gone_looks_at_no_step() -> None:
    model, tuner = start()
    parameters = list(tuner.parameters())
    tuner.finish()
    del tuner, model
    gc.collect()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
