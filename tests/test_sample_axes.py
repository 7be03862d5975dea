"""What is said to be computed by sample can be computed in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import normal
from trady.analysis.sample_axes import samples_of
from trady.errors import ModelError
from trady.model.batch import Batch
from trady.ops.sample_axis import SampleAxis
from trady.trace.forward import trace_forward

pytestmark = pytest.mark.usefixtures("no_mode_stays_behind")


class Steps(nn.Module):
    def __init__(self, steps: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def _dims(x: Tensor, d: int) -> int:
    return d % x.dim()


#: From a dimension, chosen at random, to a step; some fit few shapes.
RANDOM_STEPS: list[Callable[[int], Callable[[Tensor], Tensor]]] = [
    lambda d: lambda x: x * 2 + 1,
    lambda d: lambda x: x * x,
    lambda d: lambda x: x.softmax(_dims(x, d)),
    lambda d: lambda x: F.log_softmax(x, dim=_dims(x, d)),
    lambda d: lambda x: x.cumsum(dim=_dims(x, d)),
    lambda d: lambda x: x.transpose(_dims(x, d), -1),
    lambda d: lambda x: x.transpose(0, _dims(x, d)),
    lambda d: lambda x: x.permute(*range(1, x.dim()), 0),
    lambda d: lambda x: x.flatten(_dims(x, d)),
    lambda d: lambda x: x.flatten(0, _dims(x, d)),
    lambda d: lambda x: x.reshape(-1, x.shape[_dims(x, d)]),
    lambda d: lambda x: x.reshape(x.shape[_dims(x, d)], -1),
    lambda d: lambda x: x.reshape(x.shape[-1], x.shape[0], -1),
    lambda d: lambda x: x.unflatten(_dims(x, d), (2, -1)),
    lambda d: lambda x: x.unflatten(_dims(x, d), (-1, 2)),
    lambda d: lambda x: x.chunk(2, _dims(x, d))[-1],
    lambda d: lambda x: x.unbind(_dims(x, d))[0],
    lambda d: lambda x: x.select(_dims(x, d), 0),
    lambda d: lambda x: x.narrow(_dims(x, d), 0, x.shape[_dims(x, d)]),
    lambda d: lambda x: x[1:],
    lambda d: lambda x: x[..., :-1],
    lambda d: lambda x: x[:, ::2],
    lambda d: lambda x: x[::2],
    lambda d: lambda x: x[torch.arange(x.shape[0]).flip(0)],
    lambda d: lambda x: x[:, torch.tensor([0, 1])],
    lambda d: lambda x: x.roll(1, _dims(x, d)),
    lambda d: lambda x: torch.roll(x, dims=_dims(x, d), shifts=1),
    lambda d: lambda x: torch.roll(x, shifts=(1, 1), dims=(_dims(x, d), x.dim() - 1)),
    lambda d: lambda x: x.flip(_dims(x, d)),
    lambda d: lambda x: torch.cat([x, x + 1], _dims(x, d)),
    lambda d: lambda x: torch.stack([x, x + 1], _dims(x, d)),
    lambda d: lambda x: x @ x.transpose(-1, -2),
    lambda d: lambda x: x.transpose(-1, -2) @ x,
    lambda d: lambda x: x.mean(_dims(x, d)),
    lambda d: lambda x: x - x.mean(_dims(x, d), keepdim=True),
    lambda d: lambda x: x + x.sum(dim=_dims(x, d), keepdim=True),
    lambda d: lambda x: x.amax(_dims(x, d)),
    lambda d: lambda x: x - x.mean(),
    lambda d: lambda x: F.normalize(x, 2, _dims(x, d)),
    lambda d: lambda x: F.layer_norm(x, x.shape[_dims(x, d) :]),
    lambda d: lambda x: x.unsqueeze(_dims(x, d)),
    lambda d: lambda x: x.unsqueeze(_dims(x, d)).squeeze(),
    lambda d: lambda x: x.squeeze(_dims(x, d)),
    lambda d: lambda x: x.unsqueeze(_dims(x, d)) * x.unsqueeze(-1),
    lambda d: lambda x: x.unsqueeze(0) + x.unsqueeze(1),
    lambda d: lambda x: x.expand(3, *x.shape),
    lambda d: lambda x: x.repeat(2, *(1,) * (x.dim() - 1)),
    lambda d: lambda x: x.gather(_dims(x, d), torch.zeros_like(x, dtype=torch.long)),
    lambda d: lambda x: x.index_select(_dims(x, d), torch.tensor([1, 0])),
    lambda d: lambda x: F.pad(x, (1, 1)),
    lambda d: lambda x: F.pad(x, (1, -1)),
    lambda d: lambda x: F.pad(x, (0, 0, 1, -1)),
    lambda d: lambda x: x.tril(),
    lambda d: lambda x: F.glu(torch.cat([x, x], -1), _dims(x, d)),
    lambda d: lambda x: F.scaled_dot_product_attention(x, x, x),
    lambda d: lambda x: F.group_norm(x, 1),
    lambda d: lambda x: F.instance_norm(x),
    lambda d: lambda x: F.interpolate(x, scale_factor=2),
    lambda d: lambda x: F.max_pool1d(x, 2),
    lambda d: lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda d: lambda x: x.logsumexp(_dims(x, d)),
    lambda d: lambda x: x.std(_dims(x, d), keepdim=True) * x,
    lambda d: lambda x: torch.where(x > 0, x, x.new_zeros(x.shape)),
    lambda d: lambda x: x.unfold(_dims(x, d), 2, 2),
    lambda d: lambda x: x.unfold(_dims(x, d), 2, 1),
    lambda d: lambda x: x.masked_fill(x > x.mean(_dims(x, d), keepdim=True), 0.5),
    lambda d: lambda x: F.linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype)),
    lambda d: lambda x: F.embedding(torch.arange(x.shape[0]).flip(0), x),
    lambda d: lambda x: torch.einsum("b...,b...->...", x, x),
    lambda d: lambda x: x.movedim(_dims(x, d), 0),
    lambda d: lambda x: x.swapaxes(0, _dims(x, d)),
    lambda d: lambda x: x.div(x.shape[0]),
]


@pytest.mark.filterwarnings("ignore:std")
@settings(max_examples=150)
@given(
    rest=st.sampled_from([(3,), (4, 6), (2, 4, 6), (4, 4), (2, 2, 2, 4)]),
    chosen=st.lists(st.tuples(st.integers(0, len(RANDOM_STEPS) - 1), st.integers(0, 4)), min_size=1, max_size=5),
    cut=st.integers(1, 3),
)
def test_what_is_said_to_be_by_sample_can_be_computed_in_parts(
    rest: tuple[int, ...], chosen: list[tuple[int, int]], cut: int
) -> None:
    x = normal(4, *rest, dtype=torch.float64)
    steps: list[Callable[[Tensor], Tensor]] = []
    value = x
    for number, dim in chosen:
        step = RANDOM_STEPS[number](dim)
        try:
            value = step(value)
        except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
            continue
        if value.numel() > 20000 or value.numel() == 0:
            return
        steps.append(step)
    model = Steps(steps)
    trace = trace_forward(model, x)
    try:
        doubled = trace_forward(model, Batch.of(x).doubled)
    except ModelError:
        return
    samples = samples_of(trace, doubled)
    if not samples or any(found is None for found in samples):
        return
    last = samples[-1]
    assert last is not None
    along = last.outputs[0] if last.outputs else None
    if along is None:
        return
    whole = model(x)
    found = torch.cat([model(x[:cut]), model(x[cut:])], along.dim)
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("number", range(len(RANDOM_STEPS)))
def test_every_rule_alone_in_every_dimension(number: int) -> None:
    for rest in ((3,), (4, 6), (2, 4, 6), (4, 4)):
        for before in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x.flatten(0, 1)):
            for dim in range(4):
                step = RANDOM_STEPS[number](dim)
                model, x = Steps([before, step]), normal(4, *rest, dtype=torch.float64)
                try:
                    whole = model(x)
                    parted = [model(x[:1]), model(x[1:])]
                    samples = samples_of(trace_forward(model, x), trace_forward(model, Batch.of(x).doubled))
                except (RuntimeError, IndexError, ValueError, ZeroDivisionError, ModelError):
                    continue
                last = samples[-1] if samples and all(found is not None for found in samples) else None
                along = last.outputs[0] if last is not None and last.outputs else None
                if along is not None:
                    torch.testing.assert_close(torch.cat(parted, along.dim), whole, rtol=1e-9, atol=1e-9)


def test_where_samples_lie() -> None:
    def made(step: Callable[[Tensor], Tensor], *shape: int) -> list[SampleAxis | None]:
        model, x = Steps([step]), normal(*shape)
        found = samples_of(trace_forward(model, x), trace_forward(model, Batch.of(x).doubled))
        return [entry.outputs[0] if entry is not None else None for entry in found]

    assert made(lambda x: x.flatten(0, 1), 4, 3, 5) == [SampleAxis(0, 3)]
    assert made(lambda x: x.transpose(0, 1), 4, 3, 5) == [SampleAxis(1, 1)]
    assert made(lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)), 4, 3, 5) == [SampleAxis(0, 3), SampleAxis(0, 1)]
    assert made(lambda x: x.transpose(0, 1).flatten(0, 1), 4, 3, 5) == [SampleAxis(1, 1), None]
    assert made(lambda x: x.unbind(0)[0], 4, 3) == [None]
    assert made(lambda x: x.transpose(0, 1).reshape(3 * len(x), 5), 4, 3, 5)[-1] is None
