"""The tuner follows the optimizer: the state of channels that come, stay and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trady
from tests.models import Residual, normal, relative_error, seeded, snapshot
from tests.neurons import picked
from tests.tuned import OPTIMIZERS, data, every_optimizer, prepared, train
from trady.errors import StateError


def rows_of_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """State with a row for every channel."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value.clone()
        for name, value in state.items()
        if isinstance(value, Tensor) and (value.dim() == parameter.dim() or name == "exp_avg_sq_row")
        and value.shape[0] == len(parameter)
        and not (name == "col_var" and parameter.dim() == 2)
    }  # fmt: skip


@every_optimizer
def test_state_of_channels_that_stay_is_kept_and_of_others_dropped(make: Callable[..., torch.optim.Optimizer]) -> None:
    tuner = prepared(budget="elements:4000")
    optimizer = tuner.attach(make(tuner.parameters()))
    stayed = 0
    for epoch in range(4):
        train(tuner, optimizer, range(epoch, epoch + 1), 3)
        selection = {name: channels.tolist() for name, channels in tuner.selection.items()}
        compacts = {
            layer.name: dict(tuner.named_parameters())[f"{layer.parameter}.channels"] for layer in tuner.plan.table
        }
        before = {name: rows_of_state(optimizer, compact) for name, compact in compacts.items()}
        now = tuner.resample(epoch + 1)
        for name, compact in compacts.items():
            channels = now.channels.get(name, np.empty(0, dtype=np.int64)).tolist()
            state = optimizer.state.get(compact, {})
            staying = [c for c in channels if c in selection.get(name, ())]
            for key, value in rows_of_state(optimizer, compact).items():
                assert len(value) == len(channels)
                for channel in staying:
                    old = before[name][key][selection[name].index(channel)]
                    assert torch.equal(value[channels.index(channel)], old), (name, key)
                    stayed += 1
            if not channels:
                assert not any(isinstance(v, Tensor) and v.numel() > 1 for v in state.values())
            assert all(
                v.shape[0] == len(channels) for k, v in state.items()
                if isinstance(v, Tensor) and v.dim() == compact.dim() and k != "col_var"
            )  # fmt: skip
    if optimizer.state and not (isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]):
        assert stayed > 0
    tuner.finish()


@every_optimizer
def test_every_optimizer_trains_through_draws_in_which_nothing_stays(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    class Alternating:
        name, uses_ranking = "alternating", False

        def select(self, draw: Any) -> trady.Selection:
            sets = [{"stem.0": [0], "2": []}, {"stem.0": [1, 2], "blocks.0.conv1": [3]}, {"blocks.0.conv1": [1]}, {}]
            wanted = sets[draw.epoch % 4]
            return trady.Selection({n: c for n, c in wanted.items() if n in draw.table.names})

    tuner = prepared(policy=Alternating(), budget="elements:100000")
    optimizer = tuner.attach(make(tuner.parameters()))
    losses = train(tuner, optimizer, range(9), 2)
    assert all(np.isfinite(losses))
    weights = snapshot(tuner.finish())
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


@every_optimizer
def test_linear_layers_train_through_draws_of_one_channel(make: Callable[..., torch.optim.Optimizer]) -> None:
    """One row is the size of a column statistic: the two must not be taken for each other."""

    class Growing:
        name, uses_ranking = "growing", False

        def select(self, draw: Any) -> trady.Selection:
            return picked({"1": [[3], [3, 5, 6], [5], [1, 5]][draw.epoch % 4]})

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(243, 9), nn.ReLU(), nn.Linear(9, 5))

    tuner = prepared(seeded(build), policy=Growing(), budget="elements:100000")
    optimizer = tuner.attach(make(tuner.parameters()))
    assert all(np.isfinite(train(tuner, optimizer, range(6), 2)))
    tuner.finish()


def test_one_channel_that_stays_trains_as_if_nothing_else_had_been_there() -> None:
    """AdamW with a growing and shrinking neighbourhood equals AdamW on that channel alone."""

    class Neighbours:
        uses_ranking = False

        def __init__(self, alone: bool) -> None:
            self.name, self.alone = f"neighbours {alone}", alone

        def select(self, draw: Any) -> trady.Selection:
            return picked({"stem.0": [1] if self.alone or draw.epoch % 2 == 0 else [0, 1, 2]})

    ends = []
    for alone in (True, False):
        model = seeded(Residual).double()
        tuner = trady.prepare(
            model, normal(4, 3, 9, 9, dtype=torch.float64), budget="elements:99999", policy=Neighbours(alone), head=()
        )
        optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
        for epoch in range(4):
            tuner.resample(epoch)
            for _ in range(2):
                optimizer.zero_grad()
                # A loss whose gradient does not depend on the weights.
                model.stem[0](normal(2, 3, 9, 9, dtype=torch.float64)).sum().backward()
                optimizer.step()
        ends.append(tuner.finish().get_parameter("stem.0.weight")[:, 1].detach())
    assert relative_error(*ends) < 1e-12


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (OPTIMIZERS[n], c)
        for n, c in [("SGD", 0), ("momentum", 1), ("Adam", 2), ("AdamW", 2), ("amsgrad", 3), ("RMSprop", 3)]
    ],
)
def test_optimizer_state_is_counted(make: Callable[..., torch.optim.Optimizer], copies: int) -> None:
    tuner = prepared(budget="update:60 KiB")
    optimizer = tuner.attach(make(tuner.parameters()))
    cost = tuner.cost()
    assert cost.update_bytes == cost.saved_channel_bytes + cost.compact_bytes * (2 + copies) <= 60 * 1024
    train(tuner, optimizer)
    compacts = [p for n, p in tuner.named_parameters() if n.endswith(".channels")]
    held = sum(
        v.nbytes for p in compacts for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.dim()
    )
    assert held <= copies * tuner.cost().compact_bytes
    tuner.finish()


def test_attach_refuses_an_optimizer_without_our_parameters_and_lbfgs() -> None:
    tuner = prepared()
    with pytest.raises(StateError, match=r"tuner\.parameters\(\)"):
        tuner.attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(StateError, match="LBFGS"):
        tuner.attach(torch.optim.LBFGS(tuner.parameters()))
    tuner.finish()


def test_several_optimizers_and_parameter_groups() -> None:
    tuner = prepared()
    named = dict(tuner.named_parameters())
    channels = [p for n, p in named.items() if n.endswith(".channels")]
    head = [p for n, p in named.items() if not n.endswith(".channels")]
    first = tuner.attach(torch.optim.AdamW([{"params": channels, "lr": 0.01, "weight_decay": 0.0}]))
    second = tuner.attach(torch.optim.SGD(head, lr=0.1))
    before = snapshot(tuner.model)
    for epoch in range(3):
        tuner.resample(epoch)
        tuner.model(data()[0][0]).square().sum().backward()
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    after = snapshot(tuner.finish())
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert any(not torch.equal(before[n], after[n]) for n in before if "conv" in n)
