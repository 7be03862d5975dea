"""The lean operations against PyTorch's own, one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from trady.ops import bits, layout
from trady.ops import layer as layer_module
from trady.ops.activation import affine_clamp, clamp
from trady.ops.bits import Clamp, clamp_, pack_mask, select
from trady.ops.dropout import dropout
from trady.ops.layer import LayerCall, layer
from trady.ops.native import library
from trady.ops.operators import Convolution, Linear
from trady.ops.pooling import Window, average_pool, max_pool
from trady.ops.selected import channel_major, gather_channels, scatter_channels_, select_channels

CLAMPS = {
    "none": None,
    "relu": Clamp(0.0),
    "relu6": Clamp(0.0, 6.0),
    "hardtanh": Clamp(-0.5, 0.5),
    "leaky": Clamp(0.0, math.inf, 0.1),
}

#: name -> (dimensions, stride, padding, dilation, groups, pad, kernel, spatial size)
CONVOLUTIONS = {
    "conv1d": (1, (1,), (0,), (1,), 1, (), (3,), (7,)),
    "conv1d strided dilated": (1, (2,), (2,), (2,), 2, (), (3,), (8,)),
    "conv1d pad": (1, (2,), (0,), (1,), 1, (2, 0), (4,), (7,)),
    "conv2d": (2, (1, 1), (1, 1), (1, 1), 1, (), (3, 3), (5, 4)),
    "conv2d strided": (2, (2, 1), (1, 0), (1, 1), 1, (), (3, 2), (6, 5)),
    "conv2d dilated": (2, (1, 1), (2, 2), (2, 2), 1, (), (3, 3), (5, 5)),
    "conv2d grouped": (2, (1, 2), (1, 1), (1, 1), 3, (), (3, 3), (4, 5)),
    "conv2d depthwise": (2, (2, 2), (1, 1), (1, 1), 6, (), (3, 3), (5, 5)),
    "conv2d uneven pad": (2, (2, 2), (0, 0), (1, 1), 1, (0, 1, 1, 2), (3, 3), (5, 4)),
    "conv2d uneven pad depthwise": (2, (1, 1), (0, 0), (1, 1), 6, (1, 0, 0, 1), (2, 2), (4, 4)),
    "pointwise": (2, (1, 1), (0, 0), (1, 1), 1, (), (1, 1), (9, 8)),
    "pointwise strided": (2, (2, 2), (0, 0), (1, 1), 1, (), (1, 1), (5, 4)),
    "pointwise grouped": (2, (1, 1), (0, 0), (1, 1), 2, (), (1, 1), (4, 4)),
    "conv3d": (3, (1, 2, 1), (1, 0, 1), (1, 1, 1), 1, (), (2, 3, 2), (3, 5, 3)),
    "conv3d grouped": (3, (1, 1, 1), (1, 1, 1), (1, 1, 1), 2, (), (3, 1, 2), (3, 3, 3)),
}  # fmt: skip


class Case:
    """A layer call with its dense twin in plain PyTorch."""

    def __init__(
        self,
        name: str,
        *,
        clamp: str = "none",
        norm: bool = False,
        dtype: torch.dtype = torch.float64,
        channels: tuple[int, ...] = (0, 1, 4),
        batch: int = 2,
        seed: int = 0,
        bias: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.clamp, self.inputs, outputs = CLAMPS[clamp], 6, 12
        if name in CONVOLUTIONS:
            _, stride, padding, dilation, groups, pad, kernel, size = CONVOLUTIONS[name]
            self.map = Convolution(stride, padding, dilation, groups, pad)
            self.weight = normal(outputs, self.inputs // groups, *kernel) / 3
            self.x = normal(batch, self.inputs, *size)
        else:
            self.map = Linear(input_major=name == "addmm")
            self.weight = normal(self.inputs, outputs) if name == "addmm" else normal(outputs, self.inputs)
            self.x = normal(batch, self.inputs) if norm or name == "addmm" else normal(batch, 3, self.inputs)
        groups = self.map.groups
        self.selected = select_channels(np.array(channels), groups, self.inputs // groups, torch.device("cpu"))
        self.bias = normal(outputs) if bias else None
        self.scale = (normal(outputs).abs() + 0.5) if norm else None
        self.shift = normal(outputs) if norm else None
        self.compact = gather_channels(self.weight, self.map.kind, groups, self.selected).requires_grad_()
        self.x.requires_grad_()

    def lean(self, x: Tensor, compact: Tensor) -> Tensor:
        call = LayerCall(self.map, self.selected, self.clamp)
        return layer(x, compact, call, self.weight, self.bias, self.scale, self.shift)

    def dense(self, x: Tensor, compact: Tensor) -> Tensor:
        weight = self.weight.clone()
        channel_major(weight, self.map.kind, self.map.groups)[self.selected.group, self.selected.channel] = compact
        if isinstance(self.map, Linear):
            y = x @ weight + self.bias if self.map.input_major else F.linear(x, weight, self.bias)
        else:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.map.stride) - 1]
            x = F.pad(x, self.map.pad) if self.map.pad else x
            y = convolve(x, weight, self.bias, self.map.stride, self.map.padding, self.map.dilation, self.map.groups)
        if self.scale is not None:
            along = (1, -1, *(1,) * (y.dim() - 2))
            y = y * self.scale.view(along) + self.shift.view(along)
        if self.clamp is None:
            return y
        return F.leaky_relu(y, self.clamp.slope) if self.clamp.slope else y.clamp(self.clamp.low, self.clamp.high)

    def gradients(self, function, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y = function(self.x, self.compact)
        upstream = (
            torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view(y.shape)
            if upstream is None
            else upstream
        )
        return (y.detach(), *torch.autograd.grad(y, [self.x, self.compact], upstream))


LAYERS = [*CONVOLUTIONS, "linear", "addmm"]


def close(left, right, tolerance: float = 1e-11) -> bool:
    return all((a - b).norm() <= tolerance * (1 + b.norm()) for a, b in zip(left, right, strict=True))


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
        def forward(ctx, compact: Tensor) -> Tensor:
            case.weight = case.weight.clone()
            scatter_channels_(case.weight, case.map.kind, case.map.groups, case.selected, compact.detach())
            with torch.enable_grad():
                ctx.leaf = compact.detach().requires_grad_()
                ctx.y = case.lean(case.x.detach(), ctx.leaf)
            return ctx.y.detach()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
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
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
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

    def run(first, second) -> Tensor:
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
        kept.append(y.grad)
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
            def forward(ctx, t: Tensor) -> Tensor:
                return t.clone()

            @staticmethod
            def backward(ctx, gradient: Tensor) -> Tensor:
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
        def forward(ctx, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            made = gradient.clone()
            seen.append(made.data_ptr())
            return made

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            seen.append(gradient.data_ptr())
            return gradient.clone()

    assert layout._references_when_alone() is not None
    x = torch.randn(64, 64, requires_grad=True)
    Watch.apply(clamp(Sink.apply(x), Clamp(0.0), in_place=False)).sum().backward()
    assert seen[0] == seen[1]


# -- one bit an element ------------------------------------------------------------------------------------------


def reference(kind: Clamp, x: Tensor) -> Tensor:
    return (
        F.leaky_relu(x, kind.slope)
        if kind.slope
        else F.hardtanh(x, kind.low, kind.high)
        if kind.high < math.inf
        else F.relu(x)
    )


@pytest.fixture(params=["native", "plain PyTorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param != "native":
        monkeypatch.setattr(bits, "library", lambda: None)
    elif library() is None:
        pytest.skip("no compiler here")
    return request.param


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [k for k in CLAMPS if k != "none"])
def test_activations_are_pytorchs_bit_for_bit(kind: str, dtype: torch.dtype, kernels: str) -> None:
    special = torch.tensor([0.0, -0.0, 6.0, -0.5, 0.5, math.inf, -math.inf, math.nan, 1e-30, -1e-30, 7.0])
    for length in (1, 7, 8, 9, 17, 130):
        x = torch.cat([special, torch.randn(length)]).to(dtype).expand(3, -1).contiguous().requires_grad_()
        function = CLAMPS[kind]
        y, expected = clamp(x, function, in_place=False), reference(function, x)
        assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
        upstream = torch.randn(x.shape).to(dtype)
        if kind != "relu":  # PyTorch's others do not agree on the gradient at NaN, nor one of them with itself
            upstream = upstream.masked_fill(x.detach().isnan(), 0)
        found, wanted = (torch.autograd.grad(t, x, upstream)[0] for t in (y, expected))
        assert torch.equal(found, wanted)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from([k for k in CLAMPS.values() if k is not None]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_native_kernels_equal_plain_pytorch(
    shape: list[int], dtype: torch.dtype, kind: Clamp, last: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> Tensor:
        made = (3 * torch.randn(shape, generator=generator)).round(decimals=1).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else made

    x, gradient = tensor(), tensor()
    results = []
    original = bits.library
    for replaced in (original, lambda: None):
        bits.library = replaced
        try:
            y = x.clone()
            packed = clamp_(y, kind, keep_bits=True)
            results.append((y, packed, select(gradient, packed, kind, out=torch.empty_like(gradient))))
        finally:
            bits.library = original
    for native, plain in zip(*results, strict=True):
        assert torch.equal(native, plain)


def test_a_bit_an_element_and_no_more() -> None:
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        clamp(x, Clamp(0.0), in_place=False)
    assert [t.numel() * t.element_size() for t in kept] == [x.numel() // 8]


@given(rows=st.integers(1, 5), length=st.integers(1, 40), seed=st.integers(0, 99))
def test_masks_come_out_as_they_were_packed(rows: int, length: int, seed: int) -> None:
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (rows, -(-length // 8))
    found = select(torch.ones(rows, length), packed, Clamp(0.0), out=torch.empty(rows, length))
    assert torch.equal(found.bool(), mask)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [k for k in CLAMPS if k != "none"])
def test_gradcheck_of_activations_and_frozen_norms(kind: str, in_place: bool) -> None:
    x = (torch.randn(2, 4, 3, 5, dtype=torch.float64) * 2).requires_grad_()
    scale, shift = torch.tensor([0.5, -1.0, 2.0, 1.5]).double(), torch.tensor([0.1, 0.2, -0.3, 0.0]).double()
    assert gradcheck(lambda x: clamp(x * 1, CLAMPS[kind], in_place=in_place), (x,))
    assert gradcheck(lambda x: affine_clamp(x * 1, scale, shift, CLAMPS[kind], in_place=in_place), (x,))
    assert gradcheck(lambda x: affine_clamp(x * 1, scale, shift, None, in_place=in_place), (x,))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2), (2, 4, 3, 2, 2)])
def test_a_frozen_norm_is_batch_norm_in_evaluation(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mean, variance, weight, bias = (torch.rand(4).double() + 0.1 for _ in range(4))
    scale = weight * torch.rsqrt(variance + 1e-5)
    found = affine_clamp(x, scale, bias - mean * scale, None, in_place=False)
    expected = F.batch_norm(x, mean, variance, weight, bias)
    upstream = torch.randn(shape).double()
    assert torch.allclose(found, expected)
    assert torch.allclose(*(torch.autograd.grad(t, x, upstream)[0] for t in (found, expected)))


def test_activations_of_tensors_laid_out_in_other_ways() -> None:
    base = torch.randn(4, 6, 5, 7)
    for x in (base.transpose(1, 3), base[:, ::2], base[..., 1:], base.contiguous(memory_format=torch.channels_last)):
        leaf = x.detach().requires_grad_()
        for upstream in (torch.randn(x.shape), torch.randn(x.shape).contiguous(memory_format=torch.channels_last)):
            found, expected = clamp(leaf, Clamp(0.0), in_place=False), F.relu(leaf)
            assert torch.equal(found, expected)
            assert torch.equal(*(torch.autograd.grad(t, leaf, upstream)[0] for t in (found, expected)))


# -- pooling and dropout -----------------------------------------------------------------------------------------

WINDOWS = {
    "3 by 2": Window((3, 3), (2, 2), (1, 1), (1, 1)),
    "uneven": Window((2, 3), (2, 1), (0, 1), (2, 1), True),
    "1d": Window((3,), (2,), (1,), (1,)),
    "1d dilated": Window((2,), (1,), (0,), (3,)),
    "3d": Window((3, 2, 2), (2, 2, 1), (1, 1, 0), (1, 1, 1)),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_max_pooling_is_pytorchs(window: str) -> None:
    w = WINDOWS[window]
    x = torch.randn((3, 4, 9, 8, 7)[: 2 + len(w.kernel)], dtype=torch.float64, requires_grad=True)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(w.kernel) - 1]
    expected = pool(x, w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode)
    found = max_pool(x, w)
    assert torch.equal(found, expected)
    upstream = torch.randn(found.shape).double()
    assert torch.allclose(*(torch.autograd.grad(t, x, upstream)[0] for t in (found, expected)))
    assert gradcheck(lambda x: max_pool(x, w), (x[:1].detach().requires_grad_(),))


@given(data=st.data())
@settings(max_examples=60)
def test_max_pooling_of_any_window(data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, 3))
    kernel, stride, dilation = (tuple(data.draw(st.integers(1, n)) for _ in range(dimensions)) for n in (4, 3, 2))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(d * (k - 1) + 1 + data.draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True))
    window = Window(kernel, stride, padding, dilation, data.draw(st.booleans()))
    x = torch.randn(
        data.draw(st.integers(1, 3)), 2, *size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    x.requires_grad_()
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dimensions - 1]
    found, expected = max_pool(x, window), pool(x, kernel, stride, padding, dilation, window.ceil_mode)
    assert torch.equal(found, expected)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(*(torch.autograd.grad(t, x, upstream)[0] for t in (found, expected)), atol=1e-6)


def test_max_pooling_keeps_a_byte_an_output() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = max_pool(x, WINDOWS["3 by 2"])
    assert [t.numel() * t.element_size() for t in kept] == [y.numel()]


def test_average_pooling_keeps_nothing() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        average_pool(
            x,
            lambda x: F.avg_pool2d(x, 2),
            lambda g, like: torch.ops.aten.avg_pool2d_backward(g, like, [2, 2], [2, 2], [0, 0], False, True, None),
        )
    assert kept == []


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_is_pytorchs_under_the_same_seed(probability: float) -> None:
    for shape in ((3, 7), (2, 4, 5, 3)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        found = dropout(x, probability)
        after = torch.rand(3)
        torch.manual_seed(3)
        expected = F.dropout(x, probability)
        assert torch.equal(after, torch.rand(3))
        assert torch.equal(found, expected)
        upstream = torch.randn(shape).double()
        assert torch.allclose(*(torch.autograd.grad(t, x, upstream)[0] for t in (found, expected)), rtol=1e-12)


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
