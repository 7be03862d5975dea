"""Cross-entropy in chunks, and smooth activations that keep codes of their derivative."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

import trady
from tests.models import normal, relative_error, seeded
from tests.tight_budget import predicted_peak
from trady.errors import BudgetError
from trady.memory import LiveBytes
from trady.ops import loss as loss_module
from trady.ops import smooth as smooth_module
from trady.ops.layout import CHUNK_BYTES
from trady.ops.loss import cross_entropy, row_losses
from trady.ops.native import library
from trady.ops.smooth import SMOOTH, Smooth, bits_for, codes_of, derivative_error, error_table, smooth

GELU = Smooth("gelu")
by_name = pytest.mark.parametrize("kind", SMOOTH, ids=lambda kind: kind.name)


@pytest.fixture(params=["native", "plain PyTorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param != "native":
        for module in (loss_module, smooth_module):
            monkeypatch.setattr(module, "library", lambda: None)
    elif library() is None:
        pytest.skip("no compiler here")
    return request.param


def scores_and_targets(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    target[::3] = -100
    return 3 * normal(rows, classes, seed=seed + 1, dtype=dtype), target


# -- cross-entropy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_passes_gradcheck(reduction: str) -> None:
    x, target = scores_and_targets(5, 7, torch.float64)

    def loss(scores: Tensor) -> Tensor:
        return cross_entropy(scores * 1, target, reduction=reduction)

    assert gradcheck(loss, x.requires_grad_())


@pytest.mark.usefixtures("kernels")
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    classes=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    strided=st.booleans(),
    overwrite=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_cross_entropy_is_pytorchs(
    rows: int, classes: int, dtype: torch.dtype, reduction: str, strided: bool, overwrite: bool, scale: float
) -> None:
    x, target = scores_and_targets(rows, classes, dtype)
    if rows == 1:
        target = target.clamp(min=0)
    leaf = (scale * x).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction=reduction)
    scores = leaf.t().contiguous().t() if strided else leaf * 1
    found = cross_entropy(scores, target, reduction=reduction, overwrite=overwrite)
    assert found.dtype == F.cross_entropy(leaf, target, reduction=reduction).dtype
    precision = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2e-2)
    assert torch.allclose(found.double(), expected, rtol=precision, atol=precision * scale)
    upstream = normal(max(1, found.numel()), dtype=dtype).view(found.shape)
    found.backward(upstream)
    expected.backward(upstream.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    assert torch.allclose(leaf.grad.double(), exact.grad, rtol=precision, atol=precision)


@pytest.mark.usefixtures("kernels")
def test_cross_entropy_of_many_rows_is_pytorchs() -> None:
    x, target = scores_and_targets(700, 1801, torch.float32)  # several chunks, the last one short
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = cross_entropy(leaf, target), F.cross_entropy(other, target)
    found.backward()
    expected.backward()
    assert torch.allclose(found, expected)
    assert leaf.grad is not None
    assert other.grad is not None
    assert relative_error(leaf.grad, other.grad) < 1e-6


@pytest.mark.usefixtures("kernels")
def test_rows_that_are_all_ignored_have_pytorchs_loss_and_no_gradient() -> None:
    x, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), 2)
    found = cross_entropy(x, target, ignore_index=2)
    found.backward()
    assert found.isnan()
    assert x.grad is not None
    assert not x.grad.any()
    assert cross_entropy(x, target, ignore_index=2, reduction="sum") == 0


@pytest.mark.usefixtures("kernels")
def test_masked_classes_have_no_gradient() -> None:
    x = torch.randn(4, 40)
    x[:, 5:9] = -torch.inf
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    target = torch.tensor([0, 1, 2, 39])
    cross_entropy(leaf, target).backward()
    F.cross_entropy(other, target).backward()
    assert leaf.grad is not None
    assert not leaf.grad[:, 5:9].any()
    assert torch.allclose(leaf.grad, other.grad, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_target_that_is_no_class_is_an_error_as_in_pytorch(wrong: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(torch.randn(2, 4), torch.tensor([0, wrong]))


def test_the_gradient_can_take_the_memory_of_the_scores() -> None:
    x, target = scores_and_targets(6, 9, torch.float32)
    leaf = x.requires_grad_()
    scores = leaf * 1
    seen: list[Tensor] = []
    scores.register_hook(seen.append)
    loss = cross_entropy(scores, target, overwrite=True)
    loss.backward(retain_graph=True)
    assert seen[0].data_ptr() == scores.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shown", [lambda x: x, lambda x: x.view(-1, 3), lambda x: x.t()], ids=["itself", "view", "t"])
def test_scores_that_a_caller_holds_are_never_overwritten(shown: object) -> None:
    leaf = torch.randn(3, 6, requires_grad=True)
    before = leaf.detach().clone()
    scores = shown(leaf)  # type: ignore[operator]
    cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64), overwrite=True).backward()
    assert torch.equal(leaf, before)
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() != leaf.data_ptr()


def test_cross_entropy_says_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
        cross_entropy(torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="'median'"):
        cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), reduction="median")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("overwrite", "copies"), [(False, 1), (True, 0)])
def test_cross_entropy_takes_no_more_than_its_gradient(device: str, overwrite: bool, copies: int) -> None:
    rows, classes = 256, 8192
    leaf, target = torch.empty(rows, classes, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    scores = leaf.fill_(1.0).requires_grad_() * 1
    size = rows * classes * 4
    with LiveBytes() as live:
        live.register([leaf, scores, target], "inputs")
        before = live.current
        loss = cross_entropy(scores, target, overwrite=overwrite)
        assert live.current - before < 10_000
        torch.autograd.grad(loss, scores)
    assert live.peak - before <= copies * size + 2.5 * CHUNK_BYTES
    assert size > 2.5 * CHUNK_BYTES


def test_under_autocast_scores_are_not_copied_to_float32() -> None:
    x, target = scores_and_targets(8, 5, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = cross_entropy(x, target), F.cross_entropy(x, target)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.allclose(found, expected)


def test_where_nobody_reads_the_loss_its_gradient_is_the_same() -> None:
    x, target = scores_and_targets(6, 5, torch.float32)
    leaf = x.requires_grad_()
    grads = [
        torch.autograd.grad(row_losses(leaf, target, -100, "mean", graph_only=only), leaf)[0] for only in (False, True)
    ]
    assert torch.equal(*grads)


class Speaks(nn.Module):
    """Scores over a vocabulary, and their loss inside of the model; ``tempered`` reads the scores once more."""

    def __init__(self, tempered: bool = False) -> None:
        super().__init__()
        self.embedding, self.tempered = nn.Embedding(30, 8), tempered
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.norm, self.scores = nn.LayerNorm(8), nn.Linear(8, 50)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        scores = self.scores(x)
        if self.tempered:
            scores = scores * scores.sigmoid()
        return F.cross_entropy(scores.view(-1, 50), labels.view(-1))


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("tempered", [False, True])
def test_a_model_with_its_loss_inside_has_the_dense_gradients(
    recompute: str, tempered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_MINIMUM_BYTES", 0)
    called: list[bool] = []

    def counted(*args: object, overwrite: bool = False, **options: object) -> Tensor:
        called.append(overwrite)
        return row_losses(*args, overwrite=overwrite, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("trady.calls.kinds.loss.row_losses", counted)
    model = seeded(lambda: Speaks(tempered))
    ids, labels = torch.randint(0, 30, (6, 5)), torch.randint(0, 50, (6, 5))
    labels[:, 0] = -100
    model.requires_grad_(True)
    expected_loss = model(ids, labels)
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tuner = trady.prepare(
        model, (ids, labels), budget="elements:100000000", policy="full", head="scores", recompute=recompute
    )
    try:
        found = model(ids, labels)
        found.backward()
        assert torch.allclose(found, expected_loss)
        assert called
        assert any(called) == (recompute == "all" and not tempered)
        gradients = dict(tuner.named_parameters())
        assert relative_error(gradients["scores.weight"].grad, expected["scores.weight"]) < 1e-5
        wanted = expected["up.weight"].t()
        assert relative_error(gradients["up.weight.channels"].grad, wanted) < 1e-5
    finally:
        tuner.finish()


# -- smooth activations ------------------------------------------------------------------------------------------


def gradient_of(x: Tensor, kind: Smooth, bits: int, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = smooth(leaf, kind, bits)
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    return y.detach(), gradient


@by_name
def test_the_derivatives_that_are_rounded_pass_gradcheck(kind: Smooth) -> None:
    x = normal(40, dtype=torch.float64)

    class Exact(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return kind.value(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * kind.derivative(ctx.saved_tensors[0])

    assert gradcheck(Exact.apply, x.requires_grad_())


@by_name
@pytest.mark.usefixtures("kernels")
@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.sampled_from([8, 4, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "channels last"]),
)
def test_the_value_is_pytorchs_and_the_gradient_off_by_half_a_step(
    kind: Smooth, shape: list[int], bits: int, dtype: torch.dtype, layout: str
) -> None:
    if (kind.name, bits) == ("hardswish", 2):
        return  # its derivative has jumps of half a unit: rounded or looked up, neighbours differ by more
    x = 4 * normal(*shape, dtype=dtype)
    if layout == "transposed":
        x = x.transpose(0, -1)
    elif layout == "sliced":
        x = torch.cat([x, x], -1)[..., ::2]
    elif layout == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    upstream = normal(*x.shape, seed=2, dtype=dtype)
    y, gradient = gradient_of(x, kind, bits, upstream)
    expected = kind.value(x)
    close = torch.allclose(y, expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(y, expected) if x.is_contiguous() else close
    wide = x.double()
    off = (gradient.double() - upstream.double() * kind.derivative(wide)).abs()
    rounding = 0.02 if dtype == torch.bfloat16 else 0.004  # of a table's place, and of the gradient itself
    jump = ((wide.abs() - 3).abs() < 0.01) if kind.name == "hardswish" else torch.zeros_like(wide, dtype=torch.bool)
    allowed = (codes_of(kind, bits).step / 2 + rounding) * upstream.double().abs()
    assert bool(((off <= allowed + 1e-12) | jump).all())


@by_name
def test_fewer_bits_have_larger_errors_and_eight_are_below_half_a_percent(kind: Smooth) -> None:
    errors = [derivative_error(kind, bits) for bits in (8, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.005
    x, upstream = normal(200, 300), normal(200, 300, seed=2)
    exact = upstream * kind.derivative(x)
    found = [relative_error(gradient_of(x, kind, bits, upstream)[1], exact) for bits in (8, 4, 2)]
    assert found == pytest.approx(errors, rel=0.15)
    assert kind.name in error_table()


@by_name
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zero_is_kept_exactly_and_the_codes_reach_both_bounds(kind: Smooth, bits: int) -> None:
    codes = codes_of(kind, bits)
    derivative = kind.derivative(torch.linspace(-30, 30, 100_001, dtype=torch.float64))
    rounded = codes.decode(codes.encode(derivative.clone()), torch.float64)
    assert float((rounded - derivative).abs().max()) <= codes.step / 2 + 1e-9
    assert not codes.decode(codes.encode(torch.zeros(1)), torch.float32).any()


@pytest.mark.parametrize("kind", [Smooth("gelu"), Smooth("silu"), Smooth("mish")], ids=lambda kind: kind.name)
@pytest.mark.usefixtures("kernels")
def test_saturated_and_undefined_inputs(kind: Smooth) -> None:
    x = torch.tensor([-1e30, -50.0, 50.0, 1e30, 0.0])
    _, gradient = gradient_of(x, kind, 8, torch.ones(5))
    assert gradient[:4].tolist() == pytest.approx([0, 0, 1, 1], abs=codes_of(kind, 8).step)
    assert smooth(torch.tensor([torch.nan], requires_grad=True), kind, 8).isnan().all()


@pytest.mark.parametrize(("bits", "a_byte"), [(8, 1), (4, 2), (2, 4)])
def test_the_ledger_shows_the_codes_and_nothing_else(bits: int, a_byte: int) -> None:
    x = torch.randn(16, 1000, requires_grad=True)
    ledger = trady.measure(lambda: smooth(x * 1, GELU, bits).sum().backward())
    assert [(s.kind, s.bytes) for s in ledger.saved] == [("bits", 16_000 // a_byte)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(3, 1001), (5,), (2, 0)])
def test_without_memory_as_many_bytes_are_counted(in_place: bool, shape: tuple[int, ...]) -> None:
    peaks = []
    for device in ("cpu", "meta"):
        with LiveBytes() as live:
            leaf = torch.zeros(shape, device=device).requires_grad_()
            y = smooth(leaf * 1, GELU, 4, in_place=in_place)
            held = live.current
            y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == y.shape
        peaks.append(held)
    assert peaks[0] == peaks[1]


@pytest.mark.usefixtures("kernels")
def test_in_place_overwrites_its_input_alone() -> None:
    leaf = normal(6, 7).requires_grad_()
    x = leaf * 1
    y = smooth(x, Smooth("silu"), 8, in_place=True)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, F.silu(leaf))
    y.sum().backward()
    expected = Smooth("silu").derivative(leaf.detach())
    assert relative_error(leaf.grad, expected) < 0.005


@pytest.mark.usefixtures("kernels")
def test_a_gradient_that_others_read_is_not_overwritten() -> None:
    leaf = normal(6, 7).requires_grad_()
    x = leaf * 1
    kept: list[Tensor] = []
    out = smooth(x, GELU, 8) + x  # both branches are handed one tensor
    out.register_hook(lambda g: kept.append(g))
    upstream = normal(6, 7, seed=2)
    before = upstream.clone()
    out.backward(upstream)
    assert torch.equal(upstream, before)
    assert torch.equal(kept[0], before)
    assert relative_error(leaf.grad, before * (1 + GELU.derivative(leaf.detach()))) < 0.005


def test_a_fidelity_that_an_activation_does_not_reach_falls_back_and_says_so() -> None:
    assert bits_for(GELU, "exact") == (None, None)
    assert bits_for(GELU, "8bit") == (8, None)
    assert bits_for(GELU, "4bit") == (4, None)
    bits, remark = bits_for(GELU, "2bit")
    assert bits == 4
    assert remark is not None
    assert "gelu: 4 bits" in remark
    assert bits_for(Smooth("hardswish"), "8bit")[0] is None
    with pytest.raises(BudgetError, match="'3bit'"):
        bits_for(GELU, "3bit")


class Gated(nn.Module):
    """GELU, SiLU on a slice, SiLU in place, tanh by method."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.third, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, -1)
        x = x + self.second(F.silu(left) * right)
        x = x + F.gelu(self.third(x), approximate="tanh")
        return self.head(F.silu(self.third(x), inplace=True).tanh())


def test_an_armed_model_keeps_codes_only_where_it_was_asked_to() -> None:
    model, x = seeded(Gated), normal(4, 5, 16)
    gradients = {}
    saved = {}
    for fidelity in ("exact", "8bit"):
        tuner = trady.prepare(model, x, budget="elements:100000000", policy="full", recompute="none", fidelity=fidelity)
        try:
            model.zero_grad()
            ledger = tuner.ledger(lambda: model(x).square().sum().backward())
            saved[fidelity] = {(s.operation, s.kind) for s in ledger.saved}
            gradients[fidelity] = {name: p.grad.clone() for name, p in tuner.named_parameters() if p.grad is not None}
        finally:
            tuner.finish()
    assert ("silu", "activations") in saved["exact"]
    assert {("silu", "bits"), ("gelu_tanh", "bits"), ("tanh", "activations")} <= saved["8bit"]
    assert ("silu", "activations") not in saved["8bit"]
    for name, exact in gradients["exact"].items():
        assert relative_error(gradients["8bit"][name], exact) < 0.01, name


def test_tables_that_are_made_once_are_no_part_of_a_predicted_step() -> None:
    tables: list[Any] = [codes_of, derivative_error, smooth_module._coding]
    for made in tables:
        made.cache_clear()
    model, x = seeded(Gated), normal(4, 5, 16)
    tuner = trady.prepare(model, x, budget="peak:1 MiB", policy="full", recompute="none", fidelity="8bit")
    ledger = tuner.ledger(lambda: model(x).square().sum().backward(), inference=False)
    assert ledger.peak_bytes <= predicted_peak(tuner.plan) < 1.1 * ledger.peak_bytes
    tuner.finish()
