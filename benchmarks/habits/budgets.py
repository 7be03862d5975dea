"""Loops that do other things than a plan was made for, under a budget in bytes; every step is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from benchmarks.habits.networks import Text, convolutions, images, loss_of, perceptron, tokens, vectors
from benchmarks.habits.row import Program, Rows, Side

ROWS = Rows()

Step = Callable[[nn.Module, Any, Tensor, Tensor], object]


def _plain(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    loss_of(model, x, y).backward()
    optimizer.step()
    optimizer.zero_grad()


def _zero_first(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.step()


def _zero_late(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    loss = loss_of(model, x, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _accumulate(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for _ in range(2):
        (loss_of(model, x, y) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def _micro_batches(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for part in range(0, len(x), 2):
        (loss_of(model, x[part : part + 2], y[part : part + 2]) * 2 / len(x)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _triplets(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    F.triplet_margin_loss(model(x), model(x.flip(0)), model(x.roll(1, 0))).backward()
    optimizer.step()
    optimizer.zero_grad()


def _siamese(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    F.cosine_embedding_loss(model(x), model(x.flip(0)), torch.ones(len(x))).backward()
    optimizer.step()
    optimizer.zero_grad()


def _contrastive(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    views = F.normalize(model(x), dim=1)
    F.cross_entropy(views @ views.T - 9 * torch.eye(len(views)), torch.arange(len(views)).roll(len(x))).backward()
    optimizer.step()
    optimizer.zero_grad()


class _TwoViews(nn.Module):
    """SimCLR's encoder: a batch and its mirror image in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = convolutions()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(torch.cat([x, x.flip(-1)]))
        return out


def _narrow(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _evaluating(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    _plain(model, optimizer, x, y)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def _logging(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    model(x)  # for a log, with gradients on; its graph is dropped
    _plain(model, optimizer, x, y)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def _loop(
    build: Callable[[], nn.Module],
    batches: list[Tensor],
    step: Step,
    make: Callable[[Any], torch.optim.Optimizer] = _sgd,
    *,
    over: float = 1.3,
    **options: Any,
) -> Program:
    """Make a step on each batch, after preparing on the first one."""

    def program(side: Side) -> None:
        model = build()
        tuner = side.prepare(model, batches[0], over=over, **options)
        optimizer = tuner.attach(make(model.parameters()))
        for x in batches:
            y = torch.arange(len(x)) % 3
            side.step(lambda x=x, y=y: step(model, optimizer, x, y))  # type: ignore[misc]

    return program


def _convolutions_float() -> nn.Module:
    return convolutions().float()


def _text_float() -> nn.Module:
    return Text().float()


_X, _IDS = images(), tokens(8, 8)

# -- kept, and to the same weights ---------------------------------------------------------------------

ROWS.add("peak: the plain loop, convolutions")(_loop(convolutions, [_X] * 3, _plain))
ROWS.add("peak: the plain loop, attention")(_loop(Text, [_IDS] * 3, _plain))
ROWS.add("peak: zero_grad() before the forward pass")(_loop(convolutions, [_X] * 3, _zero_first))
ROWS.add("peak: AdamW, whose state grows")(_loop(convolutions, [_X] * 3, _plain, _adamw))
ROWS.add("peak: evaluation in the middle")(_loop(convolutions, [_X] * 3, _evaluating))
ROWS.add("peak: a pass for a log, its graph dropped")(_loop(Text, [_IDS] * 3, _logging))
ROWS.add("peak: smaller batches, a shorter last one")(_loop(Text, [_IDS, _IDS[:5], _IDS[:, :4]], _plain))
ROWS.add("peak: everything recomputed")(_loop(Text, [_IDS] * 3, _plain, recompute="all"))
ROWS.add("peak: three calls of the model, told: calls_per_step=3")(
    _loop(Text, [_IDS] * 3, _triplets, over=1.2, calls_per_step=3)
)
ROWS.add("peak: two calls of the model, told: calls_per_step=2")(
    _loop(convolutions, [_X] * 3, _siamese, over=1.2, calls_per_step=2)
)
ROWS.add("peak: SimCLR, two views in one batch, told by the example")(
    _loop(_TwoViews, [_X] * 3, _contrastive, over=1.2)
)
ROWS.add("peak: accumulation, told: accumulates=True")(_loop(convolutions, [_X] * 3, _accumulate, accumulates=True))
ROWS.add("peak: micro-batches by hand, told")(
    _loop(convolutions, [_X] * 3, _micro_batches, micro_batch=2, accumulates=True)
)

# -- not planned: fewer channels train, and it is said -------------------------------------------------

ROWS.add(
    "peak: as many tokens, longer sequences", told=r"\(\(8, 32\) int64,\), is not covered .* channels train from now on"
)(_loop(Text, [tokens(16, 16), tokens(8, 32), tokens(4, 64)], _plain, over=1.6))
ROWS.add("peak: longer sequences, AdamW", told=r"is not covered", expected="kept")(
    _loop(Text, [tokens(16, 16), tokens(8, 32)], _plain, _adamw, over=1.6)
)
ROWS.add("peak: a larger last batch", told=r"is not covered")(_loop(convolutions, [_X, images(5)], _plain, over=1.6))
ROWS.add("peak: zero_grad() after the forward pass", told=r"gradients of an earlier pass are still there")(
    _loop(convolutions, [images(1)] * 3, _zero_late)
)
ROWS.add("peak: accumulation, not told", told=r"gradients of an earlier pass are still there")(
    _loop(convolutions, [images(1)] * 3, _accumulate)
)
ROWS.add("peak: bf16 autocast, not told")(_loop(_convolutions_float, [_X.float()] * 3, _narrow))
ROWS.add("peak: bf16 autocast, not told, attention")(_loop(_text_float, [_IDS] * 3, _narrow))
ROWS.add("peak: bf16 autocast, told: autocast=torch.bfloat16")(
    _loop(_convolutions_float, [_X.float()] * 3, _narrow, autocast=torch.bfloat16)
)
ROWS.add("peak: bf16 autocast and everything recomputed")(
    _loop(_convolutions_float, [_X.float()] * 3, _narrow, autocast=torch.bfloat16, recompute="all")
)

# -- refused before it runs ----------------------------------------------------------------------------

ROWS.add("peak: three calls of the model, not told", refused=r"forward pass 2 before a backward.*calls_per_step=2")(
    _loop(Text, [_IDS] * 2, _triplets, over=1.1)
)
ROWS.add("peak: a sequence that cannot fit", refused=r"with no channel .* Prepare with the largest batch")(
    _loop(Text, [tokens(8, 8), tokens(1, 128)], _plain, over=1.05)
)
ROWS.add('peak: over_budget="refuse"', refused=r"is not covered by the one that was planned for")(
    _loop(Text, [tokens(8, 8), tokens(4, 32)], _plain, over=1.3, over_budget="refuse")
)
ROWS.add("a budget below the minimum", refused=r"minimum|at least|least")(
    lambda side: side.prepare(convolutions(), _X, budget="peak:1 KiB")
)


@ROWS.add("peak: policy velocity observes an epoch", expected="kept")
def _velocity(side: Side) -> None:
    model = convolutions()
    tuner = side.prepare(model, _X, over=1.5, policy="velocity")
    optimizer = tuner.attach(_sgd(model.parameters()))
    y = torch.arange(4) % 3
    for epoch in range(2):
        side.step(lambda: tuner.observe([(_X, y)], F.cross_entropy))
        tuner.resample(epoch)
        side.step(lambda: _plain(model, optimizer, _X, y))


@ROWS.add("peak: a batch that failed was not the last")
def _refused_once(side: Side) -> None:
    model = Text()
    tuner = side.prepare(model, _IDS, over=1.05)
    optimizer = tuner.attach(_sgd(model.parameters()))
    for _ in range(2):
        side.refused(lambda: loss_of(model, tokens(1, 128), torch.zeros(1, dtype=torch.int64)), "is not covered")
        side.step(lambda: _plain(model, optimizer, _IDS, torch.arange(8) % 3))


@ROWS.add("update: a larger batch", told=r"is not covered", expected="kept")
def _update(side: Side) -> None:
    model = perceptron()
    tuner = side.prepare(model, vectors(4), budget="update:8 KiB")
    optimizer = tuner.attach(_sgd(model.parameters()))
    for samples in (4, 16):
        _plain(model, optimizer, vectors(samples), torch.arange(samples) % 3)
        assert side.pick(lambda: tuner.cost().update_bytes, lambda: 0)() <= 8 * 1024, "more than 8 KiB"


@ROWS.add("peak: an optimizer of another kind than was planned for")
def _other_optimizer(side: Side) -> None:
    model = convolutions()
    tuner = side.prepare(model, _X, over=1.3)
    make = side.pick(trady.optim.AdamW, torch.optim.AdamW)
    optimizer = tuner.attach(make(tuner.parameters(), lr=0.01))
    for _ in range(3):
        side.step(lambda: _plain(model, optimizer, _X, torch.arange(4) % 3))
