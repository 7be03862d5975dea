"""Lean activations, norms, pooling and dropout against PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.layer_cases import CLAMPS, noting
from tests.plain_kernels import without_native_kernels
from trady.ops import bits
from trady.ops.activation import affine_clamp, clamp
from trady.ops.bits import Clamp, clamp_, pack_mask, select
from trady.ops.dropout import dropout
from trady.ops.native import library
from trady.ops.pooling import Window, average_pool, max_pool

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
        assert function is not None
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
    for plain in (False, True):
        with without_native_kernels(bits) if plain else nullcontext():
            y = x.clone()
            packed = clamp_(y, kind, keep_bits=True)
            assert packed is not None
            results.append((y, packed, select(gradient, packed, kind, out=torch.empty_like(gradient))))
    for native, other in zip(*results, strict=True):
        assert torch.equal(native, other)


def test_a_bit_an_element_and_no_more() -> None:
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda t: t):
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
    function = CLAMPS[kind]
    assert function is not None
    assert gradcheck(lambda x: clamp(x * 1, function, in_place=in_place), (x,))
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
    mine, theirs = (torch.autograd.grad(t, x, upstream)[0] for t in (found, expected))
    assert torch.allclose(mine, theirs)


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
    mine, theirs = (torch.autograd.grad(t, x, upstream)[0] for t in (found, expected))
    assert torch.allclose(mine, theirs)
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
    mine, theirs = (torch.autograd.grad(t, x, upstream)[0] for t in (found, expected))
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_max_pooling_keeps_a_byte_an_output() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda t: t):
        y = max_pool(x, WINDOWS["3 by 2"])
    assert [t.numel() * t.element_size() for t in kept] == [y.numel()]


def test_average_pooling_keeps_nothing() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda t: t):
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
        mine, theirs = (torch.autograd.grad(t, x, upstream)[0] for t in (found, expected))
        assert torch.allclose(mine, theirs, rtol=1e-12)
