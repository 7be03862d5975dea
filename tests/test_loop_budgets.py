"""A budget is kept by loops that do other things than the plan was made for, or the pass is refused before it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.loops import Text, convolutions, ids, images, minimum, tuned
from trady.errors import BudgetError, TradyWarning
from trady.planning.budget import StepTooLargeError

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], object]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def late_zero_grad(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def accumulating(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(2):
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def triplets(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    F.triplet_margin_loss(model(x), model(x.flip(0)), model(x.roll(1, 0))).backward()
    optimizer.step()
    optimizer.zero_grad()


def narrow(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TradyWarning)
        yield


def peaks(
    tuner: trady.Tuner, optimizer: torch.optim.Optimizer, step: Step, batches: list[Tensor], classes: int = 3
) -> list[int]:
    found = []
    for x in batches:
        y = torch.arange(len(x)) % classes
        found.append(tuner.ledger(lambda x=x, y=y: step(tuner.model, optimizer, x, y), inference=False).peak_bytes)  # type: ignore[misc]
    return found


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_longer_sequences_of_as_many_tokens_train_fewer_channels_inside_the_budget(
    make: Callable[..., torch.optim.Optimizer], recompute: str
) -> None:
    tuner, optimizer, budget = tuned(Text(), ids(16, 16), 1.35, make, recompute=recompute)
    before = tuner.selection.count
    assert max(peaks(tuner, optimizer, plain, [ids(16, 16)])) <= budget
    with pytest.warns(TradyWarning, match=r"\(\(8, 32\) int64,\), is not covered .* channels train from now on"):
        assert max(peaks(tuner, optimizer, plain, [ids(8, 32)])) <= budget
    assert 0 < tuner.selection.count < before
    assert max(peaks(tuner, optimizer, plain, [ids(16, 16), ids(8, 32), ids(4, 8)])) <= budget


class Scaled(Text):
    """The same with a second argument."""

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        out = super().forward(ids)
        return out if scale is None else out * scale


@pytest.mark.parametrize("positional", [False, True])
def test_a_model_that_is_called_by_keywords_is_held_to_its_budget(positional: bool) -> None:
    def call(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        scale = torch.ones(3)
        F.cross_entropy(model(x, scale=scale) if positional else model(ids=x, scale=scale), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    example: Any = {"ids": ids(16, 16), "scale": torch.ones(3)}
    tuner, optimizer, budget = tuned(Scaled(), example, 1.35, torch.optim.SGD)
    before = tuner.selection.count
    with pytest.warns(TradyWarning, match=r"ids: \(8, 32\) int64.* is not covered .* channels train from now on"):
        assert max(peaks(tuner, optimizer, call, [ids(8, 32)])) <= budget
    assert 0 < tuner.selection.count < before


def test_a_pass_that_cannot_fit_is_refused_before_it_runs() -> None:
    model = Text()
    tuner, optimizer, _ = tuned(model, ids(16, 16), 1.05, torch.optim.SGD)
    weights = {name: p.detach().clone() for name, p in tuner.model.state_dict().items()}
    x = ids(1, 512)
    with pytest.raises(StepTooLargeError, match=r"with no channel .* Prepare with the largest batch"):
        plain(tuner.model, optimizer, x, torch.zeros(1, dtype=torch.int64))
    assert model.runs == 0  # what a trace leaves behind is undone
    assert all(torch.equal(weights[name], p) for name, p in tuner.model.state_dict().items())
    plain(tuner.model, optimizer, ids(16, 16), torch.arange(16) % 3)


@pytest.mark.parametrize("step", [late_zero_grad, accumulating])
def test_gradients_that_are_kept_over_a_forward_pass_are_inside_the_budget(step: Step) -> None:
    model = convolutions()
    tuner, optimizer, budget = tuned(model, images(2, 6), 1.3, torch.optim.SGD)
    with pytest.warns(TradyWarning, match="gradients of an earlier pass are still there"):
        found = peaks(tuner, optimizer, step, [images(2, 6)] * 3)
    assert max(found) <= budget


def test_accumulation_that_is_told_is_planned() -> None:
    tuner, optimizer, budget = tuned(convolutions(), images(2, 6), 1.3, torch.optim.SGD, accumulates=True)
    found = peaks(tuner, optimizer, accumulating, [images(2, 6)] * 3)
    assert max(found) <= budget
    assert max(found) == pytest.approx(tuner.plan.predicted_peak_bytes, rel=0.01)


def test_gradients_of_channels_that_stay_are_kept_when_a_loop_is_adapted_to() -> None:
    model, x, y = convolutions(), images(2, 6), torch.arange(2)
    tuner, _, _ = tuned(model, x, 1.3, torch.optim.SGD)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(TradyWarning, match="gradients of an earlier pass"):
        F.cross_entropy(model(x), y).backward()
    twin = convolutions()
    for _ in range(2):
        F.cross_entropy(twin(x), y).backward()
    joined = 0
    for layer in tuner.plan.table:
        armed = tuner._armed.layers[layer.name]
        if armed.selected is None:
            continue
        whole = twin.get_parameter(layer.parameter).grad
        assert whole is not None
        assert armed.compact.grad is not None
        expected = whole[:, armed.selected.channel].transpose(0, 1)
        for got, twice in zip(armed.compact.grad, expected, strict=True):
            once = torch.allclose(got, twice / 2, rtol=1e-4, atol=1e-7)  # a channel that joined
            joined += once
            assert once or torch.allclose(got, twice, rtol=1e-4, atol=1e-7)
    assert joined < tuner.selection.count


def test_several_calls_before_a_backward_pass_are_refused_unless_they_are_planned() -> None:
    x = ids(4, 16)
    tuner, optimizer, _ = tuned(Text(), x, 1.1, torch.optim.SGD)
    with pytest.raises(StepTooLargeError, match=r"forward pass 2 before a backward pass, 1 planned.*calls_per_step=2"):
        triplets(tuner.model, optimizer, x, x)
    told, optimizer, budget = tuned(Text(), x, 1.1, torch.optim.SGD, calls_per_step=3)
    found = peaks(told, optimizer, triplets, [x] * 3)
    assert max(found) <= budget
    assert max(found) == pytest.approx(told.plan.predicted_peak_bytes, rel=0.03)  # of the loss it knows nothing


def test_gradients_of_several_calls_are_those_of_the_plain_model() -> None:
    x = ids(4, 16)
    told, _, _ = tuned(Text(), x, 1.2, torch.optim.SGD, calls_per_step=3)
    model, twin = told.model, Text()
    for each in (model, twin):
        F.triplet_margin_loss(each(x), each(x.flip(0)), each(x.roll(1, 0))).backward()
    for layer in told.plan.table:
        armed = told._armed.layers[layer.name]
        whole = twin.get_parameter(layer.parameter).grad
        if armed.selected is not None:
            assert whole is not None
            torch.testing.assert_close(armed.compact.grad, whole[:, armed.selected.channel].t(), rtol=1e-4, atol=1e-6)


def test_a_pass_whose_graph_was_dropped_is_no_pass_of_the_step() -> None:
    x = ids(4, 16)
    tuner, optimizer, budget = tuned(Text(), x, 1.05, torch.optim.SGD)
    for _ in range(3):
        tuner.model(x)
    with torch.no_grad():
        tuner.model(ids(16, 16))
    assert max(peaks(tuner, optimizer, plain, [x])) <= budget


@pytest.mark.parametrize("recompute", ["none", "auto", "all"])
@pytest.mark.parametrize(("build", "x"), [(Text, ids(16, 16)), (convolutions, images(4, 12))])
def test_a_plan_that_is_told_of_autocast_predicts_its_peak(
    build: Callable[[], nn.Module], x: Tensor, recompute: str
) -> None:
    options: dict[str, Any] = {"recompute": recompute, "autocast": torch.bfloat16}
    tuner, optimizer, budget = tuned(build(), x, 1.3, torch.optim.SGD, **options)
    found = peaks(tuner, optimizer, narrow, [x] * 2)
    assert max(found) <= budget
    assert tuner.plan.predicted_peak_bytes is not None
    assert 0.9 * tuner.plan.predicted_peak_bytes <= max(found) <= tuner.plan.predicted_peak_bytes + 64


def test_autocast_that_is_on_while_a_model_is_prepared_is_planned_for() -> None:
    x = ids(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuner, _, _ = tuned(Text(), x, 1.3, torch.optim.SGD)
    told, _, _ = tuned(Text(), x, 1.3, torch.optim.SGD, autocast=torch.bfloat16)
    assert tuner.plan.predicted_peak_bytes == told.plan.predicted_peak_bytes
    assert tuner.selection == told.selection


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_gradients_under_autocast_are_those_of_the_plain_model(recompute: str) -> None:
    x, y = images(4, 12), torch.arange(4) % 3
    options: dict[str, Any] = {"recompute": recompute, "autocast": torch.bfloat16}
    tuner, _, _ = tuned(convolutions(), x, 1.5, torch.optim.SGD, **options)
    twin = convolutions()
    for model in (tuner.model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
    for layer in tuner.plan.table:
        armed = tuner._armed.layers[layer.name]
        whole = twin.get_parameter(layer.parameter).grad
        if armed.selected is not None:
            assert whole is not None
            expected = whole[:, armed.selected.channel].transpose(0, 1)
            error = (armed.compact.grad - expected).norm() / expected.norm()  # type: ignore[operator]
            assert error < 0.02  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(("over_budget", "kept"), [("warn", False), ("refuse", True)])
def test_what_happens_over_the_budget_can_be_chosen(over_budget: str, kept: bool) -> None:
    tuner, optimizer, budget = tuned(Text(), ids(16, 16), 1.35, torch.optim.SGD, over_budget=over_budget)
    if kept:
        with pytest.raises(StepTooLargeError, match="is not covered"):
            peaks(tuner, optimizer, plain, [ids(4, 64)])
    else:
        with pytest.warns(TradyWarning, match="the step would take"):
            assert max(peaks(tuner, optimizer, plain, [ids(4, 64)])) > budget


def test_an_update_budget_is_kept_by_larger_batches_too() -> None:
    x = images(2, 8)
    tuner = trady.prepare(convolutions(), x, budget="update:16 KiB", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    before = tuner.selection.count
    with pytest.warns(TradyWarning, match="is not covered"):
        plain(tuner.model, optimizer, images(8, 8), torch.arange(8) % 3)
    assert 0 < tuner.selection.count < before
    assert tuner.cost().update_bytes <= 16 * 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls_per_step": 0}, "calls_per_step=0: type how often"),
        ({"calls_per_step": True}, "calls_per_step=True: type how often"),
        ({"over_budget": "ignore"}, "over_budget='ignore' is not known; type one of adapt, refuse, warn"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        trady.prepare(Text(), ids(4, 8), budget="1 MiB", **options)


def test_a_run_splits_batches_that_would_break_its_budget() -> None:
    """Lengths differ from batch to batch: the longest fit in parts only."""

    class Lengths(torch.utils.data.Dataset[Any]):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return ids(1, 16)[0], torch.tensor(index % 3)

        def __len__(self) -> int:
            return 16

    def longer(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(list(part)) for part in zip(*samples, strict=True))
        made.append(0)
        return (x.repeat(1, 4) if len(made) % 3 == 0 else x), y

    made: list[int] = []
    loader = torch.utils.data.DataLoader(Lengths(), 8, collate_fn=longer)
    budget = int(1.2 * minimum(Text(), ids(8, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TradyWarning)
        result = trady.finetune(
            Text(),
            loader,
            Lengths(),
            budget=f"{budget} B",
            policy="dynamic-random",
            out=None,
            epochs=2,
            lr=0.01,
            progress=False,
        )
    assert result.peak_bytes <= budget
    assert len(made) >= 4  # batches, two of them long
