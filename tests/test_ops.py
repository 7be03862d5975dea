"""Lean layers against PyTorch's own, one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.layer_cases import CLAMPS, CONVOLUTIONS, LAYERS, Case, close, noting
from tests.models import gradient_of
from trady.ops import layer as layer_module
from trady.ops import layout
from trady.ops.activation import affine_clamp, clamp
from trady.ops.bits import Clamp, select
from trady.ops.dropout import dropout
from trady.ops.layer import LayerCall, layer
from trady.ops.operators import Linear
from trady.ops.selected import gather_channels, scatter_channels_, select_channels


@pytest.mark.parametrize("norm", [False, True], ids=["", "folded norm"])
@pytest.mark.parametrize("kind", CLAMPS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_output_and_the_gradients_of_its_dense_twin(name: str, kind: str, norm: bool) -> None:
    case = Case(name, clamp=kind, norm=norm)
    assert close(case.gradients(case.lean), case.gradients(case.dense))


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_layer_is_that_of_its_output(name: str) -> None:
    """gradcheck perturbs the input; of the channels it perturbs the weight, which holds the truth."""
    case = Case(name, norm=name != "linear", batch=1)
    assert gradcheck(lambda x: case.lean(x, case.compact), (case.x,))

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, compact: Tensor) -> Tensor:
            case.weight = case.weight.clone()
            scatter_channels_(case.weight, case.map.kind, case.map.groups, case.selected, compact.detach())
            with torch.enable_grad():
                ctx.leaf = compact.detach().requires_grad_()
                ctx.y = case.lean(case.x.detach(), ctx.leaf)
            return ctx.y.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.autograd.grad(ctx.y, ctx.leaf, gradient, retain_graph=True)[0]

    assert gradcheck(Through.apply, (case.compact,))


@pytest.mark.parametrize("kind", ["relu", "leaky"])
@pytest.mark.parametrize("name", LAYERS)
def test_computed_in_chunks_of_samples_a_layer_is_the_same(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name, clamp=kind, batch=7)
    keeper: list[Tensor] = []
    case.x.register_hook(lambda gradient: keeper.append(gradient))
    whole = case.gradients(case.lean)
    for module in (layout, layer_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    assert close(case.gradients(case.lean), whole)


@pytest.mark.parametrize("channels", [(0,), (5,), (0, 1, 2, 3, 4, 5), (1, 2), (0, 3, 5)])
@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d grouped", "conv2d depthwise", "conv2d uneven pad depthwise", "conv3d grouped"]
)
def test_any_channels_of_any_groups(name: str, channels: tuple[int, ...]) -> None:
    case = Case(name, norm=True, clamp="relu", channels=channels)
    assert close(case.gradients(case.lean), case.gradients(case.dense))


@given(data=st.data())
@settings(max_examples=60)
def test_a_convolution_of_any_geometry_has_the_dense_gradient(data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dimensions))

    groups = data.draw(st.sampled_from([1, 2, 3, 6]))
    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 2), each(0, 2)
    pad = data.draw(st.sampled_from([(), tuple(data.draw(st.integers(0, 2)) for _ in range(2 * dimensions))]))
    size = tuple(d * (k - 1) + 1 + data.draw(st.integers(0, 3)) for d, k in zip(dilation, kernel, strict=True))
    channels = tuple(sorted(data.draw(st.sets(st.integers(0, 5), min_size=1))))
    CONVOLUTIONS["drawn"] = (dimensions, stride, padding, dilation, groups, pad, kernel, size)
    try:
        case = Case(
            "drawn",
            clamp=data.draw(st.sampled_from(list(CLAMPS))),
            norm=data.draw(st.booleans()),
            channels=channels,
            batch=data.draw(st.integers(1, 4)),
            bias=data.draw(st.booleans()),
        )
    finally:
        del CONVOLUTIONS["drawn"]
    if data.draw(st.booleans()) and dimensions == 2:
        case.x = case.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert close(case.gradients(case.lean), case.gradients(case.dense))


def test_without_selected_channels_only_the_input_has_a_gradient_and_nothing_is_kept_of_it() -> None:
    case = Case("conv2d")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda t: t):
        y = layer(case.x, None, LayerCall(case.map), case.weight, case.bias)
    assert {t.data_ptr() for t in kept} == {case.weight.data_ptr()}
    assert torch.allclose(
        torch.autograd.grad(y.sum(), case.x)[0], torch.autograd.grad(case.dense(case.x, case.compact).sum(), case.x)[0]
    )
    still = layer(case.x.detach(), None, LayerCall(case.map), case.weight, case.bias)
    assert not still.requires_grad
    with torch.no_grad():
        assert not case.lean(case.x, case.compact).requires_grad


def test_products_are_made_in_the_type_that_autocast_asks_for() -> None:
    case = Case("conv2d", dtype=torch.float32, norm=True, clamp="relu", batch=4)
    exact = case.gradients(case.dense)
    call = LayerCall(case.map, case.selected, case.clamp, torch.bfloat16)
    y = layer(case.x, case.compact, call, case.weight, case.bias, case.scale, case.shift)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, [case.x, case.compact], torch.cos(torch.arange(y.numel())).view(y.shape).bfloat16())
    assert [g.dtype for g in found] == [torch.float32, torch.float32]
    assert close(found, exact[1:], 3e-2)


# -- gradients that somebody else holds --------------------------------------------------------------------------


def norm_of(x: Tensor, kind: Clamp | None) -> Tensor:
    return affine_clamp(x, torch.full((8,), 2.0, dtype=x.dtype), torch.zeros(8, dtype=x.dtype), kind, in_place=False)


OPERATIONS = {
    "layer with relu": lambda x: layer(x, None, LayerCall(Linear(), clamp=Clamp(0.0)), torch.eye(8, dtype=x.dtype)),
    "relu": lambda x: clamp(x, Clamp(0.0), in_place=False),
    "leaky relu": lambda x: clamp(x, Clamp(0.0, math.inf, 0.2), in_place=False),
    "norm": lambda x: norm_of(x, None),
    "norm and relu": lambda x: norm_of(x, Clamp(0.0)),
    "dropout": lambda x: dropout(x, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gradient_that_two_branches_share_is_not_written_into(name: str) -> None:
    """An addition hands one tensor to both of its branches."""
    operation = OPERATIONS[name]
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def run(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        y = x * 1
        left, right = first(y), second(y)
        return torch.autograd.grad((left + right).square().sum(), x)[0]

    seed_first = operation(x.detach())  # only to know that it runs without a graph, too
    assert seed_first.shape == x.shape
    both = run(lambda y: operation(y), lambda y: y * 3)
    alone = run(lambda y: operation(y) * 1, lambda y: y * 3)
    swapped = run(lambda y: y * 3, lambda y: operation(y))
    assert torch.allclose(both, alone, rtol=1e-12)
    assert torch.allclose(both, swapped, rtol=1e-12)


@pytest.mark.parametrize("keep", ["hook", "retain_grad", "expanded", "view", "given", "kept elsewhere"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gradient_that_somebody_keeps_is_not_written_into(name: str, keep: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y = OPERATIONS[name](x * 1)
    kept: list[Tensor] = []
    weights = torch.arange(1.0, 41.0, dtype=torch.float64).view(5, 8)
    if keep == "hook":
        y.register_hook(kept.append)
        (y * weights).sum().backward()
    elif keep == "retain_grad":
        y.retain_grad()
        (y * weights).sum().backward()
        kept.append(gradient_of(y))
    elif keep == "expanded":
        y.sum().backward()
        kept, weights = [torch.ones(5, 8, dtype=torch.float64)], torch.ones(5, 8, dtype=torch.float64)
    elif keep == "view":
        storage = torch.cat([weights, weights]).contiguous()
        y.backward(storage[:5])
        kept.append(storage[5:] * 0 + storage[:5])
    elif keep == "given":
        given = weights.clone()
        y.backward(given)
        kept.append(given)
    else:

        class Keeping(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, t: Tensor) -> Tensor:
                return t.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                made = gradient * weights
                kept.append(made)
                return made

        Keeping.apply(y).sum().backward()
    assert torch.equal(kept[0], weights)


def test_an_unshared_gradient_is_overwritten_rather_than_copied() -> None:
    """The claim that the tests above are not passed by copying always."""
    seen: list[int] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            made = gradient.clone()
            seen.append(made.data_ptr())
            return made

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(gradient.data_ptr())
            return gradient.clone()

    assert layout._references_when_alone() is not None
    x = torch.randn(64, 64, requires_grad=True)
    Watch.apply(clamp(Sink.apply(x), Clamp(0.0), in_place=False)).sum().backward()
    assert seen[0] == seen[1]


def test_a_layer_with_its_activation_overwrites_an_unshared_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place: list[bool] = []

    def noted(gradient: Tensor, bits: Tensor, kind: Clamp, out: Tensor) -> Tensor:
        in_place.append(out.data_ptr() == gradient.data_ptr())
        return select(gradient, bits, kind, out)

    monkeypatch.setattr(layer_module, "select", noted)
    x = torch.randn(64, 64, requires_grad=True)
    y = layer(x, None, LayerCall(Linear(), clamp=Clamp(0.0)), torch.eye(64))
    (y * 2).sum().backward()
    assert in_place == [True]


# -- selected channels -------------------------------------------------------------------------------------------


@given(groups=st.sampled_from([1, 2, 4, 8]), channels=st.sets(st.integers(0, 7), min_size=1), addmm=st.booleans())
def test_what_is_gathered_is_scattered_back(groups: int, channels: set[int], addmm: bool) -> None:
    groups = 1 if addmm else groups
    weight = torch.arange(16 * 8 // groups, dtype=torch.float64)
    weight = weight.view(8, 16) if addmm else weight.view(16, 8 // groups)
    kind = "addmm" if addmm else "conv1d"
    selected = select_channels(np.array(sorted(channels)), groups, 8 // groups, torch.device("cpu"))
    rows = gather_channels(weight, kind, groups, selected)
    for row, channel in zip(rows, sorted(channels), strict=True):
        group, inside = divmod(channel, 8 // groups)
        outputs = slice(group * 16 // groups, (group + 1) * 16 // groups)
        assert torch.equal(row, weight[channel] if addmm else weight[outputs, inside])
    changed = weight.clone()
    scatter_channels_(changed, kind, groups, selected, rows + 1000)
    assert int((changed != weight).sum()) == rows.numel()
    assert torch.equal(gather_channels(changed, kind, groups, selected), rows + 1000)
    assert sum(block.group_count * block.channels_a_group for block in selected.blocks) == len(channels)


def test_layer_calls_are_values() -> None:
    call = LayerCall(Linear(), None, Clamp(0.0))
    assert replace(call, clamp=None) == LayerCall(Linear())
    assert list(itertools.islice(layout.chunks(5, 10**9), 9)) == [slice(i, i + 1) for i in range(5)]
