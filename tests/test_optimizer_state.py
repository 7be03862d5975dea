"""State that does not have the form of its parameter, through a draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tuned import prepared, train
from trady.interception.armed import Change
from trady.tuner.optimizer_state import remap_state


def moved(compact: nn.Parameter, sources: list[int], shape: tuple[int, ...]) -> Change:
    """The parameter gets another form, of rows that were at these places; columns stay."""
    rows, columns = compact.shape[0], np.arange(compact.shape[1])
    compact.data = torch.zeros(len(sources), *shape)
    return Change("layer", compact, np.array(sources), rows, columns, len(columns))


@pytest.mark.parametrize("shape", [(3,), (4,), (3, 2, 2)], ids=["matrix", "square", "convolution"])
def test_factors_that_leave_a_dimension_out_keep_what_belongs_to_a_channel(shape: tuple[int, ...]) -> None:
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    compact = nn.Parameter(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    optimizer = adafactor([compact], lr=0.01, relative_step=False, beta1=0.9)
    compact.grad = torch.randn(compact.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[compact].items() if isinstance(v, Tensor)}
    remap_state(optimizer, moved(compact, [2, -1, 0], shape))
    after = optimizer.state[compact]
    assert torch.equal(after["exp_avg"][[0, 2]], before["exp_avg"][[2, 0]])
    row, column = before["exp_avg_sq_row"], before["exp_avg_sq_col"]
    torch.testing.assert_close(after["exp_avg_sq_row"], torch.stack([row[2], row[[2, 0]].mean(0), row[0]]))
    if len(shape) == 1:  # a mean over the channels that were there
        assert torch.equal(after["exp_avg_sq_col"], column)
    else:
        assert torch.equal(after["exp_avg_sq_col"][[0, 2]], column[[2, 0]])
    compact.grad = torch.ones_like(compact)
    optimizer.step()
    assert compact.isfinite().all()


class Blockwise(torch.optim.Optimizer):
    """Momentum in blocks of eight numbers with a common scale, as 8-bit optimizers keep it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                state = self.state[p]
                if not state:
                    state["state1"] = torch.zeros(p.shape, dtype=torch.int8)
                    state["absmax1"] = torch.zeros(-(-p.numel() // 8))
                flat = state["state1"].flatten().float() * state["absmax1"].repeat_interleave(8)[: p.numel()]
                flat = 0.9 * flat + p.grad.flatten()
                scale = torch.nn.functional.pad(flat, (0, -p.numel() % 8)).view(-1, 8).abs().amax(1).div(127)
                each = scale.repeat_interleave(8)[: p.numel()].clamp_min(1e-12)
                state["state1"] = (flat / each).round().to(torch.int8).view(p.shape)
                state["absmax1"] = scale
                p.sub_(flat.view(p.shape), alpha=group["lr"])


def test_state_in_blocks_of_many_channels_starts_anew() -> None:
    compact = nn.Parameter(torch.zeros(4, 6))
    optimizer = Blockwise([compact])
    compact.grad = torch.ones_like(compact)
    optimizer.step()
    remap_state(optimizer, moved(compact, [2, -1], (6,)))
    assert not optimizer.state.get(compact)
    compact.grad = torch.full_like(compact, 2.0)
    optimizer.step()
    torch.testing.assert_close(compact.detach(), torch.full((2, 6), -0.2))  # nothing of the old momentum


class StartsFrom(torch.optim.Optimizer):
    """Dual averaging as MADGRAD's: a step starts from the weights as they were, not from those of now."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                state = self.state[parameter]
                if not state:
                    state["x0"], state["s"] = parameter.clone(), torch.zeros_like(parameter)
                state["s"] += parameter.grad
                parameter.copy_(state["x0"] - group["lr"] * state["s"])


def test_state_that_is_made_of_weights_does_not_pull_channels_that_join_towards_zero() -> None:
    tuner = prepared()
    optimizer = tuner.attach(StartsFrom(tuner.parameters(), lr=0.0))
    before = {name: value.clone() for name, value in tuner.model.state_dict().items() if "num_batches" not in name}
    train(tuner, optimizer, epochs=range(4))  # with a rate of zero nothing moves
    joined = [p for p in tuner.parameters() if optimizer.state.get(p, {}).get("x0") is not None]
    assert joined
    tuner.finish()
    after = tuner.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
