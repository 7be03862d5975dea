"""LiveBytes: every storage counted once, from when it is seen until it dies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

from tests.models import gradient_of
from trady.memory import LiveBytes

KIB = 256  # float32 elements in one KiB


def allocated_peak(step: Callable[[], object], already: int) -> int:
    """What PyTorch's own profiler saw the allocator hand out, on top of what was there already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
    changes = []

    def collect(events: Any) -> None:
        for event in events:
            if "Allocation" in str(event.typed[0]):
                changes.append((event.start_time_ns, event.typed[1].alloc_size))
            collect(event.children)

    collect(recorded.profiler.kineto_results.experimental_event_tree())
    total = highest = already
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        total += change
        highest = max(highest, total)
    return highest


def test_a_hand_written_sequence_is_counted_to_the_byte() -> None:
    with LiveBytes() as live:
        a = torch.zeros(4 * KIB)
        b = a + 1
        assert live.current == 8 * 1024
        del a
        assert live.current == 4 * 1024
        c = b.repeat(3)
        del b, c
    assert live.current == 0
    assert live.peak == 16 * 1024
    assert live.highest()[0] == live.peak


def test_views_and_in_place_operations_count_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(8, 32)
        views = [a.t(), a[2:], a.view(-1), a.detach(), a.expand(5, 8, 32)]
        a.add_(1).relu_()
        assert live.current == live.peak == 1024
        del a
        assert live.current == 1024
        views.clear()
    assert live.current == 0


def test_a_slice_keeps_its_whole_storage_alive() -> None:
    with LiveBytes() as live:
        piece = torch.zeros(100 * KIB)[:1]
    assert piece.numel() == 1
    assert live.current == 100 * 1024


def test_a_storage_resized_or_swapped_is_counted_at_its_size() -> None:
    plain = torch.UntypedStorage.resize_
    with LiveBytes() as live:
        a = torch.zeros(KIB)
        a.resize_(4 * KIB)
        assert live.current == 4 * 1024
        a.untyped_storage().resize_(0)
        assert live.current == 0
        a.data = torch.zeros(2 * KIB)
        assert live.current == 2 * 1024
        a.set_(torch.zeros(3 * KIB).untyped_storage(), 0, (3 * KIB,), (1,))
        assert live.current == 3 * 1024
    assert torch.UntypedStorage.resize_ is plain


def test_tensors_from_before_count_once_they_are_read_or_registered() -> None:
    read, registered, other = (torch.zeros(KIB) for _ in range(3))
    with LiveBytes() as live:
        live.register([registered, registered.view(-1)], "weights")
        assert live.current == 1024
        read.sum()
        assert live.current == 2 * 1024
    assert other.numel() == KIB
    assert [storage.category for storage in live.log].count("weights") == 1


def test_what_was_there_from_the_start_raises_the_peak_that_was_before() -> None:
    late = torch.zeros(KIB)
    with LiveBytes() as live:
        torch.zeros(10 * KIB)
        live.register(late, since_start=True)
    assert live.peak == live.highest()[0] == 11 * 1024
    assert live.current == 1024


def test_interval_peaks_start_from_what_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.zeros(KIB)
        torch.zeros(5 * KIB)
        assert live.interval_peak() == 6 * 1024
        torch.zeros(2 * KIB)
        assert live.interval_peak() == 3 * 1024
        assert live.interval_peak() == 1024
    assert a.numel() == KIB


def test_peaks_are_reported_as_they_rise() -> None:
    peaks: list[Any] = []
    with LiveBytes(on_peak=peaks.append):
        a = torch.zeros(KIB)
        b = torch.zeros(KIB)
        del a
        torch.zeros(KIB)
        del b
    assert peaks == [1024, 2048]


def test_meta_and_fake_tensors_count_what_they_would_take() -> None:
    with LiveBytes() as live:
        a = torch.zeros(KIB, device="meta")
        b = a + 1
        assert live.current == 2 * 1024
        del a, b
        with FakeTensorMode():
            fake = torch.zeros(KIB) * 2
            assert live.current == 1024
            del fake
    assert live.current == 0


def test_wrapper_subclasses_count_what_they_wrap() -> None:
    with LiveBytes() as live:
        two = TwoTensor(torch.zeros(KIB), torch.zeros(KIB))
        product = two * 2
        assert live.current == 4 * 1024
        del two, product
    assert live.current == 0


def test_sparse_tensors_count_indices_and_values() -> None:
    with LiveBytes() as live:
        sparse = torch.eye(4).to_sparse()
        assert live.current == sparse._indices().nbytes + sparse._values().nbytes


def test_tensors_that_a_backward_frees_are_discounted() -> None:
    weight = torch.zeros(KIB, requires_grad=True)
    with LiveBytes() as live:
        live.register(weight)
        loss = (weight.exp() * 2).exp().sum()
        kept = live.current
        loss.backward()
        assert live.current < kept
        assert live.current == weight.nbytes + gradient_of(weight).nbytes + loss.nbytes


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sin())
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        gradient = gradient * 2 + 0 * kept
        return gradient + gradient * 0


STEPS = {
    "chain": lambda x: (x * 2).exp().sin().sum(),
    "two readers": lambda x: (lambda y: (y * 3 + y * 4).sum())(x * 2),
    "four readers": lambda x: (lambda y: (y * 3 + y * 4 + y.exp() + y.sin()).sum())(x * 2),
    "residual": lambda x: (lambda y: (y + (y * 3) * 2).sum())(x + x * 2),
    "custom function": lambda x: (lambda y: (Twice.apply(y) + y * 2 + Twice.apply(y)).sum())(x * 2),
    "matrix": lambda x: (lambda y: torch.softmax(y @ y.t(), -1).sum())(x.view(256, 256)),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_peak_of_a_training_step_is_the_allocators(name: str) -> None:
    x = torch.rand(256 * KIB, requires_grad=True)

    def step() -> None:
        STEPS[name](x).backward()
        x.grad = None

    step()
    with LiveBytes() as live:
        live.register(x)
        step()
    # The allocator also has a few scalars that never leave a kernel.
    assert live.peak == pytest.approx(allocated_peak(step, x.nbytes), abs=512)
    assert live.highest()[0] == live.peak


def test_a_gradient_held_elsewhere_is_counted_beside_the_sum() -> None:
    x = torch.rand(256 * KIB, requires_grad=True)
    held: list[Tensor] = []

    def hold(gradient: Tensor) -> Tensor:
        held.append(gradient * 1)
        return held[-1]

    def step() -> None:
        y = x * 2
        branch = y * 3
        branch.register_hook(hold)
        (branch + y.clone()).sum().backward()
        x.grad = None
        held.clear()

    step()
    with LiveBytes() as live:
        live.register(x)
        step()
    assert live.peak == pytest.approx(allocated_peak(step, x.nbytes), abs=512)


def test_nested_and_unseen_blocks_keep_their_own_counts() -> None:
    with LiveBytes() as outer:
        a = torch.zeros(KIB)
        with LiveBytes() as inner:
            b = torch.zeros(KIB)
        with outer.unseen():
            c = torch.zeros(KIB)
    assert (outer.current, inner.current) == (2 * 1024, 1024)
    assert a.numel() == b.numel() == c.numel()


def test_after_forget_the_figures_stand_still() -> None:
    with LiveBytes() as live:
        a = torch.zeros(KIB)
    live.forget()
    del a
    assert live.current == live.peak == 1024
