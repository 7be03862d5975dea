"""Batches that a loop of one's own runs in parts that fit: the gradients of the whole batch, inside the budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.alive import kept_by
from tests.loops import Text, convolutions, ids, images, minimum, tuned
from tests.small_task import small_data, small_net
from trady.errors import StateError, TradyWarning
from trady.memory.live import LiveBytes
from trady.optim import SGD
from trady.planning.budget import StepTooLargeError


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TradyWarning)
        yield


def in_parts(tuner: trady.Tuner, inputs: Any, labels: Tensor) -> list[int]:
    """Add up the gradients of a batch; return the sizes of its parts."""
    sizes, shares = [], []
    for x, y, share in tuner.micro_batches(inputs, labels):
        output = tuner.model(**x) if isinstance(x, dict) else tuner.model(x)
        (F.cross_entropy(output, y) * share).backward()
        sizes.append(len(y))
        shares.append(share)
    assert sum(sizes) == len(labels)
    assert sum(shares) == pytest.approx(1)
    return sizes


def check_gradients(tuner: trady.Tuner, twin: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Hold the gradients of the channels and of the head against those of the plain model on the whole batch."""
    F.cross_entropy(twin(inputs), labels).backward()
    compared = 0
    for layer in tuner.plan.table:
        armed = tuner._armed.layers[layer.name]
        if armed.selected is not None:
            whole = twin.get_parameter(layer.parameter).grad
            assert whole is not None
            expected = whole[:, armed.selected.channel].transpose(0, 1)
            torch.testing.assert_close(armed.compact.grad, expected, rtol=1e-4, atol=1e-6)
            compared += len(expected)
    assert compared == tuner.selection.count > 0
    for name, parameter in tuner.named_parameters():
        if not name.endswith(".channels"):
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("over_budget", ["adapt", "refuse", "warn"])
@pytest.mark.parametrize("recompute", ["none", "auto"])
@pytest.mark.parametrize(
    ("build", "planned", "longer"),
    [(Text, ids(16, 16), ids(8, 64)), (Text, ids(16, 16), ids(31, 16)), (convolutions, images(4, 8), images(7, 11))],
)
def test_parts_have_the_gradients_of_the_whole_batch_inside_the_budget(
    build: Callable[[], nn.Module], planned: Tensor, longer: Tensor, recompute: str, over_budget: str
) -> None:
    options = {"recompute": recompute, "over_budget": over_budget}
    tuner, optimizer, budget = tuned(build(), planned, 1.35, torch.optim.AdamW, **options)
    before, labels, sizes = tuner.selection, torch.arange(len(longer)) % 3, []
    ledger = tuner.ledger(lambda: sizes.extend(in_parts(tuner, longer, labels)), inference=False)
    assert len(sizes) > 1
    assert ledger.peak_bytes <= budget
    assert tuner.selection == before
    check_gradients(tuner, build(), longer, labels)
    assert tuner.ledger(optimizer.step, inference=False).peak_bytes <= budget


def test_a_batch_that_fits_is_one_part_as_it_is() -> None:
    x, labels = ids(16, 16), torch.arange(16) % 3
    tuner, _, _ = tuned(Text(), x, 1.35, torch.optim.SGD)
    ((inputs, given, share),) = tuner.micro_batches(x, labels)
    assert inputs is x
    assert given is labels
    assert share == 1
    assert [len(part) for part, _ in tuner.micro_batches(x[:5])] == [5]


def test_mappings_are_cut_by_their_entries() -> None:
    x, labels, example = ids(8, 64), torch.arange(8) % 3, {"ids": ids(16, 16)}
    tuner, _, _ = tuned(Text(), example, 1.35, torch.optim.SGD)
    assert len(in_parts(tuner, {"ids": x}, labels)) > 1
    check_gradients(tuner, Text(), x, labels)


def test_parts_are_no_larger_than_the_plan_says() -> None:
    x, labels = ids(16, 16), torch.arange(16) % 3
    for budget in ("elements:300", "4 MiB"):
        tuner = trady.prepare(Text(), x, budget=budget, policy="dynamic-random", micro_batch=6)
        assert in_parts(tuner, x, labels) == [6, 6, 4]
        check_gradients(tuner, Text(), x, labels)
        tuner.finish()
        with pytest.raises(StateError, match="cannot cut a batch"):
            tuner.micro_batches(x, labels)


def test_where_not_one_sample_fits_fewer_channels_train_before_the_first_part() -> None:
    tuner, _, budget = tuned(Text(), ids(16, 16), 1.35, torch.optim.SGD)
    x, labels, before = ids(2, 175), torch.arange(2), tuner.selection.count
    with pytest.warns(TradyWarning, match="channels train from now on"):
        ledger = tuner.ledger(lambda: in_parts(tuner, x, labels), inference=False)
    assert ledger.peak_bytes <= budget
    assert 0 < tuner.selection.count < before
    check_gradients(tuner, Text(), x, labels)


@pytest.mark.parametrize(("over_budget", "length"), [("refuse", 200), ("adapt", 600)])
def test_what_cannot_be_helped_is_refused_before_anything_runs(over_budget: str, length: int) -> None:
    model = Text()
    tuner, _, _ = tuned(model, ids(16, 16), 1.35, torch.optim.SGD, over_budget=over_budget)
    with pytest.raises(StepTooLargeError, match=rf"\(1, {length}\) int64, is not covered.*Prepare with the largest"):
        in_parts(tuner, ids(2, length), torch.arange(2))
    assert model.runs == 0
    assert all(p.grad is None for p in tuner.parameters())


def test_what_cannot_be_cut_exactly_is_left_whole() -> None:
    x, labels = ids(8, 64), torch.arange(8) % 3
    tuner = trady.prepare(Text(), ids(16, 16), budget=f"{int(1.35 * minimum(Text(), ids(16, 16)))} B", policy="head")
    tuner.attach(SGD(tuner.parameters(), lr=0.01))  # it would step in every part
    assert len(list(tuner.micro_batches(x, labels))) == 1
    of_the_batch = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), convolutions_after())
    least = minimum(of_the_batch, images(4, 8), policy="head")
    tuner = trady.prepare(of_the_batch, images(4, 8), budget=f"{least + 256} B", policy="head")
    assert len(list(tuner.micro_batches(images(16, 16)))) == 1


def convolutions_after() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_evaluation_is_cut_into_parts_that_fit() -> None:
    x, labels = images(64, 8), torch.arange(64) % 3
    tuner, optimizer, budget = tuned(convolutions(), images(8, 8), 1.2, torch.optim.AdamW, recompute="all")
    in_parts(tuner, images(8, 8), torch.arange(8) % 3)
    optimizer.step()
    optimizer.zero_grad()
    scores: list[Tensor] = []

    def evaluate() -> None:
        tuner.model.eval()
        with torch.no_grad(), tuner.untouched():
            for part, targets, share in tuner.micro_batches(x, labels):
                assert share == len(targets) / 64
                scores.append(tuner.model(part))
        tuner.model.train()

    with LiveBytes() as live:
        live.register([*kept_by(tuner, optimizer), *tuner.model.state_dict().values(), x, labels])
        evaluate()
    assert live.peak <= budget
    assert 8 <= len(scores[0]) < 64
    with LiveBytes() as live, torch.no_grad(), tuner.untouched():
        live.register([*kept_by(tuner, optimizer), *tuner.model.state_dict().values(), x, labels])
        whole = tuner.model(x)
    assert live.peak > budget
    torch.testing.assert_close(torch.cat(scores), whole)


def test_a_run_evaluates_in_parts_that_fit() -> None:
    train, evaluation = small_data(16, 0), small_data(48, 1)
    sizes: list[int] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            sizes.append(len(targets))
        return F.cross_entropy(output, targets)

    found = []
    for budget in ("160 KiB", "8 MiB"):
        sizes.clear()
        result = trady.finetune(
            small_net(), train, torch.utils.data.DataLoader(evaluation, 48), budget=budget, policy="head", epochs=1,
            batch_size=8, lr=0.01, out=None, loss=loss, progress=False,
        )  # fmt: skip
        found.append((max(sizes), sum(sizes), result.history[0].accuracy, result.history[0].evaluation_loss))
    (part, cut, accuracy, value), (whole, _, *expected) = found
    assert cut == whole == 48
    assert part < 48
    assert [accuracy, value] == pytest.approx(expected, rel=1e-5)
