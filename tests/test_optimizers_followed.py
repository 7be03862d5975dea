"""Optimizers are tried before they follow channels: state that is made of weights, and those that cannot go on."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trady
from tests.models import normal, seeded
from tests.tuned import OPTIMIZERS, data, prepared, train
from trady.errors import StateError
from trady.tuner.followed import look_at
from trady.tuner.optimizer_state import state_of_weights


class Written(torch.optim.Optimizer):
    """A parameter becomes what a rule makes of it, of its gradient and of its state."""

    rule: Callable[[dict[str, Any], Tensor, Tensor], Tensor]

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    p.copy_(type(self).rule(self.state[p], p.clone(), p.grad * group["lr"]))


class DualAveraging(Written):
    """MADGRAD's kind, with a name of its own for the starting point."""

    @staticmethod
    def rule(state: dict[str, Any], p: Tensor, step: Tensor) -> Tensor:
        begin: Tensor = state.setdefault("begin", p.clone())
        total = state["total"] = state.get("total", torch.zeros_like(p)) + step
        moved: Tensor = begin - total
        return moved


class Averages(Written):
    """Schedule-free: what is trained is an average with where plain steps would be."""

    @staticmethod
    def rule(state: dict[str, Any], p: Tensor, step: Tensor) -> Tensor:
        fast: Tensor = state.get("fast", p.clone()) - step
        state["fast"] = fast
        return p.lerp(fast, 0.3)


class SlowWeights(Written):
    """Lookahead inside of an optimizer."""

    @staticmethod
    def rule(state: dict[str, Any], p: Tensor, step: Tensor) -> Tensor:
        slow: Tensor = state.get("behind", p.clone()).lerp(p - step, 0.5)
        state["behind"] = slow
        return slow.clone()


class LeastSquares(Written):
    """Products of all rows with all others, of as many dimensions as the parameter, and a list of tensors."""

    @staticmethod
    def rule(state: dict[str, Any], p: Tensor, step: Tensor) -> Tensor:
        flat = step.reshape(len(step), -1)
        state["products"] = state.get("products", 0) + flat @ flat.T
        state["each"] = [step.clone(), state["products"]]
        whitened: Tensor = (torch.eye(len(p)) + state["products"]).inverse() @ step.reshape(len(step), -1)
        moved: Tensor = p - whitened.view(p.shape)
        return moved


class Stubborn(Written):
    """Makes its state once, in the first step of all."""

    @staticmethod
    def rule(state: dict[str, Any], p: Tensor, step: Tensor) -> Tensor:
        state.setdefault("form", torch.zeros(p.numel()))
        form: Tensor = state["form"]
        return p - step - form.view(p.shape)


class StubbornAndBlind(Stubborn):
    """The same, from a store beside its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.beside: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and p.numel():
                p.sub_(p.grad * 0.1 + self.beside.setdefault(p, torch.zeros_like(p)))


@pytest.mark.parametrize(
    ("kind", "name"), [(DualAveraging, "begin"), (Averages, "fast"), (SlowWeights, "behind")]
)  # fmt: skip
def test_state_of_weights_is_found_whatever_its_name_and_pulls_nothing_towards_zero(kind: Any, name: str) -> None:
    tuner = prepared()
    optimizer = tuner.attach(kind(tuner.parameters(), lr=0.0))
    assert state_of_weights[optimizer] == {name}
    before = {key: value.clone() for key, value in tuner.model.state_dict().items() if "num_batches" not in key}
    train(tuner, optimizer, range(4))  # with a rate of zero nothing may move
    tuner.finish()
    after = tuner.model.state_dict()
    weights = [key for key in before if "running" not in key]
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in weights)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "transformers" not in name])
def test_of_torchs_optimizers_only_one_keeps_weights(name: str) -> None:
    parameter = nn.Parameter(normal(4, 3))
    optimizer = OPTIMIZERS[name]([parameter])
    look_at(optimizer, [parameter])
    assert state_of_weights[optimizer] == ({"ax"} if name == "ASGD" else set())


def test_every_optimizer_of_torch_is_in_the_tests_or_refused() -> None:
    kinds = {
        name for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }  # fmt: skip
    tested = {type(make([nn.Parameter(normal(2, 2))])).__name__ for make in OPTIMIZERS.values()}
    # Refused; below; for sparse gradients, which channels never have.
    assert kinds - tested == {"LBFGS", "Muon", "SparseAdam"}


def test_muon_follows_matrices_beside_another_optimizer_for_the_rest() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(243, 9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 5)))
    tuner = prepared(model, budget="elements:600")
    matrices = [p for name, p in tuner.named_parameters() if name.endswith(".channels")]
    ours = {id(p) for p in matrices}
    muon = tuner.attach(torch.optim.Muon(matrices, lr=0.01))
    rest = tuner.attach(torch.optim.SGD([p for p in tuner.parameters() if id(p) not in ours], lr=0.01))
    assert state_of_weights[muon] == frozenset()
    for epoch in range(4):
        train(tuner, muon, range(epoch, epoch + 1), 1)
        rest.step()
        rest.zero_grad()
        held = [p for p in matrices if len(p) and muon.state.get(p)]
        assert held
        assert all(muon.state[p]["momentum_buffer"].shape == p.shape for p in held)
    tuner.finish()


def test_products_of_channels_and_lists_start_anew_after_a_draw() -> None:
    tuner = prepared()
    optimizer = tuner.attach(LeastSquares(tuner.parameters(), lr=0.01))
    assert state_of_weights[optimizer] == frozenset()
    train(tuner, optimizer, range(4))
    tuner.finish()


def test_an_optimizer_that_cannot_go_on_is_refused_by_name_and_stays_as_it_was() -> None:
    tuner = prepared()
    optimizer = StubbornAndBlind(tuner.model.parameters())
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(StateError, match=r"StubbornAndBlind cannot go on when other channels train.*take AdamW, SGD"):
        tuner.attach(optimizer)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))
    tuner.attach(Stubborn(tuner.parameters()))  # its state is dropped, and made again
    tuner.finish()


class Lookahead(torch.optim.Optimizer):
    """As people wrap it around another optimizer; its slow weights are made in its first step, or at once."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, at_once: bool = False) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.optimizer, self.state = optimizer, defaultdict(dict)
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        if at_once:
            for p in self.param_groups[0]["params"]:
                self.state[p]["slow_params"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow_params", p.detach().clone())
            p.copy_(slow.lerp_(p, 0.5))


def test_what_a_wrapper_keeps_follows_too_and_copies_of_whole_weights_are_refused() -> None:
    tuner = prepared()
    with pytest.raises(StateError, match="Lookahead has copies of whole weights already"):
        tuner.attach(Lookahead(torch.optim.SGD(tuner.model.parameters(), lr=0.1), at_once=True))
    optimizer = tuner.attach(Lookahead(torch.optim.SGD(tuner.parameters(), lr=0.0)))
    before = {name: value.clone() for name, value in tuner.model.named_parameters()}
    train(tuner, optimizer, range(4))
    assert any(name.get("slow_params") is not None for name in optimizer.state.values())
    tuner.finish()
    assert all(torch.equal(before[name], value) for name, value in tuner.model.named_parameters())


def test_an_average_of_the_model_over_draws_is_that_of_its_whole_weights() -> None:
    tuner = prepared()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    average = torch.optim.swa_utils.AveragedModel(tuner.model)
    total = {name: torch.zeros_like(value) for name, value in tuner.model.named_parameters()}
    for epoch in range(3):
        train(tuner, optimizer, range(epoch, epoch + 1), 2)
        average.update_parameters(tuner.model)
        for name, value in tuner.model.named_parameters():
            total[name] += value.detach() / 3
    tuner.finish()
    assert any(not torch.equal(value, total[name]) for name, value in tuner.model.named_parameters())
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value.detach(), total[name])


def test_looking_at_an_optimizer_takes_no_random_numbers_and_leaves_it_as_it_is() -> None:
    tuner = prepared()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01)
    state = torch.get_rng_state()
    tuner.attach(optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state
    loss = nn.functional.cross_entropy(tuner.model(data()[0][0]), data()[0][1])
    loss.backward()
    optimizer.step()
    tuner.finish()
    assert isinstance(tuner.plan, trady.Plan)
