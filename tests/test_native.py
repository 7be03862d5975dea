"""The C kernels against PyTorch's own operations, and the paths without them."""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.models import relative_error
from tests.plain_kernels import without_native_kernels
from trady.ops import bits, native, pooling
from trady.ops.native import depthwise, library
from trady.ops.operators import Convolution
from trady.ops.pooling import Window, max_pool
from trady.ops.selected import select_channels

needs_compiler = pytest.mark.skipif(library() is None, reason="no compiler here")


@pytest.fixture(params=["native", "plain PyTorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param != "native":
        for module in (bits, pooling, depthwise, native):
            monkeypatch.setattr(module, "library", lambda: None)
    elif library() is None:
        pytest.skip("no compiler here")
    return request.param


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small planes take the kernels too, so that what is tested is quick."""
    monkeypatch.setattr(depthwise, "_POSITIONS", 0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- max pooling -------------------------------------------------------------------------------------------------


def pytorchs_pool(x: Tensor, w: Window) -> Tensor:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(w.kernel) - 1]
    return pool(x, w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Tensor, Window]:
    dimensions = draw(st.integers(1, 3))
    kernel, stride, dilation = (tuple(draw(st.integers(1, n)) for _ in range(dimensions)) for n in (5, 3, 2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 9)) for d, k in zip(dilation, kernel, strict=True))
    x = normal(draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 130])), *size, seed=draw(st.integers(0, 99)))
    x = (2 * x).round() / 2  # many ties
    special = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(x.numel()) % 3].view_as(x)
    x = torch.where(normal(*x.shape, seed=1) > 2.0 - draw(st.integers(0, 4)), special, x)
    x = x.to(draw(st.sampled_from([torch.float32, torch.float64])))
    if dimensions == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, Window(kernel, stride, padding, dilation, draw(st.booleans()))


@given(case=pools())
@settings(max_examples=150, deadline=None)
def test_max_pooling_has_pytorchs_values_ties_and_nans(case: tuple[Tensor, Window]) -> None:
    x, window = case
    x.requires_grad_()
    expected = pytorchs_pool(x, window)
    upstream = normal(*expected.shape, seed=2, dtype=x.dtype)
    wanted = torch.autograd.grad(expected, x, upstream)[0]
    for plain in (False, True):
        with without_native_kernels(pooling) if plain else nullcontext():
            found = max_pool(x, window)
            gradient = torch.autograd.grad(found, x, upstream)[0]
            with torch.no_grad():
                alone = max_pool(x, window)
        for pooled in (found, alone):
            assert torch.equal(pooled.isnan(), expected.isnan())
            assert torch.equal(pooled.nan_to_num(7), expected.nan_to_num(7))
        assert torch.allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
def test_max_pooling_of_rows_longer_than_a_strip(kernels: str, last: bool) -> None:
    x = normal(2, 150, 5, 301)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    for stride in ((1, 1), (2, 2), (2, 3)):
        window = Window((3, 3), stride, (1, 1), (1, 1))
        found, expected = max_pool(x, window), pytorchs_pool(x, window)
        assert torch.equal(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last) == last or kernels != "native"
        upstream = normal(*found.shape)
        mine, theirs = (torch.autograd.grad(t, x, upstream)[0] for t in (found, expected))
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("window", [Window((3, 2), (2, 1), (1, 1), (1, 2), True), Window((3,), (2,), (1,), (1,))])
def test_gradcheck_of_max_pooling(kernels: str, window: Window) -> None:
    x = normal(2, 3, 7, 6, dtype=torch.float64) if len(window.kernel) == 2 else normal(2, 3, 9, dtype=torch.float64)
    assert gradcheck(lambda x: max_pool(x, window), (x.requires_grad_(),))


def test_max_pooling_of_windows_that_pytorch_refuses_says_what_pytorch_says(kernels: str) -> None:
    for window in (Window((3, 3), (1, 1), (2, 2), (1, 1)), Window((9, 9), (1, 1), (0, 0), (1, 1))):
        with pytest.raises(RuntimeError):
            max_pool(normal(1, 2, 5, 5).requires_grad_(), window)


# -- depthwise convolutions --------------------------------------------------------------------------------------


@st.composite
def depthwise_cases(draw: st.DrawFn) -> tuple[Convolution, Tensor, Tensor, Tensor | None]:
    dimensions = draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, stride, dilation, padding = each(1, 7), each(1, 4), each(1, 3), each(0, 4)
    pad = draw(st.sampled_from([(), tuple(draw(st.integers(0, 3)) for _ in range(2 * dimensions))]))
    size = tuple(max(1, d * (k - 1) + 1 + draw(st.integers(0, 40))) for d, k in zip(dilation, kernel, strict=True))
    channels, dtype = draw(st.sampled_from([2, 3, 6])), draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 99))
    x = normal(draw(st.integers(1, 3)), channels, *size, seed=seed, dtype=dtype)
    weight = normal(channels, 1, *kernel, seed=seed + 1, dtype=dtype)
    bias = normal(channels, dtype=dtype) if draw(st.booleans()) else None
    return Convolution(stride, padding, dilation, channels, pad), x, weight, bias


@given(case=depthwise_cases(), some=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_depthwise_convolution_of_any_geometry_is_pytorchs(
    case: tuple[Convolution, Tensor, Tensor, Tensor | None], some: bool
) -> None:
    convolution, x, weight, bias = case
    wide = x.double().requires_grad_(), weight.double().requires_grad_(), None if bias is None else bias.double()
    convolve = (F.conv1d, F.conv2d)[len(convolution.stride) - 1]
    c = convolution
    expected = convolve(F.pad(wide[0], c.pad), wide[1], wide[2], c.stride, c.padding, c.dilation, c.groups)
    upstream = normal(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, wide[:2], upstream.double())
    channels = np.arange(0, c.groups, 2 if some else 1)
    selected = select_channels(channels, c.groups, 1, torch.device("cpu"))
    for plain in (False, True):
        with without_native_kernels(depthwise) if plain else nullcontext():
            y = c.forward(x, weight, bias)
            gradient = c.input_gradient(upstream.to(x.dtype), weight, x.shape)
            out = torch.ones(len(channels), 1, *weight.shape[2:], dtype=x.dtype)
            c.weight_gradient(upstream.to(x.dtype), x[:, channels].contiguous(), selected, out)
        exact = 1e-9 if x.dtype == torch.float64 else 2e-5
        pairs = ((y, expected), (gradient, wanted[0]), (out - 1, wanted[1][channels]))
        for found, truth in pairs:
            assert found.shape == truth.shape
            assert (found - truth).norm() <= exact * (1 + truth.norm())


@needs_compiler
def test_the_kernels_take_what_they_are_meant_for() -> None:
    """The claim that the test above does not compare PyTorch with itself."""
    x, weight = normal(2, 4, 9, 7), normal(4, 1, 3, 3)
    sides = depthwise.geometry(x.shape, weight.shape, (2, 1), (1, 1), (1, 1), (0, 1, 2, 0))
    assert sides == (2, 4, 9, 7, 6, 8, 3, 3, 2, 1, 3, 1, 1, 1)
    y = depthwise.forward(x, weight, None, sides)
    assert y is not None
    assert depthwise.input_gradient(y, weight, x.shape, sides) is not None
    assert depthwise.add_weight_gradient(y, x, torch.arange(4), torch.zeros(4, 1, 3, 3), sides)
    assert depthwise.forward(x.double(), weight.double(), None, sides) is None
    assert depthwise.forward(x.contiguous(memory_format=torch.channels_last), weight, None, sides) is None


def test_repeated_weight_gradients_are_the_same_bit_for_bit(kernels: str) -> None:
    x, y = normal(9, 6, 33, 31), normal(9, 6, 33, 31, seed=1)
    convolution = Convolution((1, 1), (2, 2), (1, 1), 6)
    selected = select_channels(np.arange(6), 6, 1, torch.device("cpu"))
    found = [torch.zeros(6, 1, 5, 5) for _ in range(3)]
    for out in found:
        convolution.weight_gradient(y, x, selected, out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weight_gradients_of_tall_kernels_are_right(kernels: str, layout: torch.memory_format) -> None:
    """Those of oneDNN are not, from 41 rows on."""
    x, g = (normal(3, 4, 80, 8, seed=i).contiguous(memory_format=layout) for i in range(2))
    convolution = Convolution((1, 1), (32, 0), (1, 1), 4)
    selected, out = select_channels(np.arange(4), 4, 1, torch.device("cpu")), torch.zeros(4, 1, 65, 1)
    convolution.weight_gradient(g, x, selected, out)
    weight = torch.zeros(4, 1, 65, 1, dtype=torch.float64, requires_grad=True)
    F.conv2d(x.double(), weight, padding=(32, 0), groups=4).backward(g.double())
    assert relative_error(out.double(), weight.grad) < 1e-5


# -- products of pointwise convolutions, shapes without memory, the library ----------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("stride", "size"), [((1, 1), (9, 8)), ((2, 2), (47, 46)), ((3, 1), (40, 41)), ((2,), (1099,))]
)
def test_pointwise_products_are_pytorchs_convolution(
    stride: tuple[int, ...], size: tuple[int, ...], biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trady.ops import layout
    from trady.ops import operators as maps

    monkeypatch.setattr(maps, "_CACHED_BYTES", 1000)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 60000)
    for samples in (1, 5):
        x, weight = normal(samples, 6, *size, dtype=dtype), normal(10, 6, *(1 for _ in size), seed=1, dtype=dtype)
        bias = normal(10, dtype=dtype) if biased else None
        zeros, ones = tuple(0 for _ in size), tuple(1 for _ in size)
        convolution = Convolution(stride, zeros, ones, 1)
        x.requires_grad_()
        expected = (F.conv1d, F.conv2d)[len(size) - 1](x, weight, bias, stride)
        upstream = normal(*expected.shape, dtype=dtype)
        with torch.no_grad():
            found = convolution.forward(x.detach(), weight, bias)
            gradient = convolution.input_gradient(upstream, weight, x.shape)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(gradient, torch.autograd.grad(expected, x, upstream)[0], atol=1e-5)
        assert gradient._base is None


def test_shapes_without_memory_come_out_as_those_with_it(kernels: str) -> None:
    x, weight = normal(2, 4, 9, 8).contiguous(memory_format=torch.channels_last), normal(4, 1, 3, 3)
    window, c = Window((3, 3), (2, 2), (1, 1), (1, 1)), Convolution((2, 2), (1, 1), (1, 1), 4)
    selected = select_channels(np.arange(2), 4, 1, torch.device("cpu"))
    made = []
    for device in ("cpu", "meta"):
        leaf = x.to(device).requires_grad_()
        pooled = max_pool(leaf, window)
        gradient = torch.autograd.grad(pooled, leaf, torch.ones_like(pooled))[0]
        plain, w = x.contiguous().to(device), weight.to(device)
        y = c.forward(plain, w, None)
        back = c.input_gradient(y, w, plain.shape)
        c.weight_gradient(y, plain[:, :2].contiguous(), selected, torch.zeros(2, 1, 3, 3, device=device))
        made.append([(t.shape, t.stride(), t.dtype) for t in (pooled, gradient, y, back)])
    assert made[0] == made[1]


def test_large_tensors_are_asked_for_once_and_stay_what_they_are(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LARGE_BYTES", 0)
    for x in (torch.empty(3000, 1000), torch.empty(1), torch.empty(0), torch.empty(7, device="meta")):
        assert native.unwritten(x) is x
    x = native.unwritten(torch.empty(5000, 300)).fill_(1)
    assert int(x.sum()) == x.numel()


@needs_compiler
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flags", native._COMPILE_FLAGS, ids=" ".join)
def test_the_kernels_compile_with_any_of_the_flags(compiler: str, flags: list[str], tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    try:
        native._build(compiler, flags, tmp_path / "kernels.so")
    except subprocess.CalledProcessError:
        assert "-fopenmp" in flags, "plain flags must do"
        pytest.skip(f"{compiler} here has no OpenMP")
    assert (tmp_path / "kernels.so").exists()


def test_a_user_without_a_home_has_the_kernels_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (folder,) = native._cache_folders()
    assert folder.parent == tmp_path
