"""Updates inside the backward pass: the same numbers as torch.optim's, without the gradients of all layers at once."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import trady
from tests.models import Residual, SharedLayer, Tokens, normal, same, seeded, snapshot
from tests.optimizer_pairs import (
    KINDS,
    assert_same_states,
    every_kind,
    images,
    inside,
    loss_of,
    outer,
    prepared,
    states,
    tokens,
    train,
)
from tests.small_task import small_data, small_net
from tests.tight_budget import predicted_peak
from trady.errors import StateError, TrainingError
from trady.simulation.optimizer_probe import state_copies

# -- the same result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "batch", "policy"),
    [(Residual, images, "trady"), (SharedLayer, images, "dynamic-random"), (Tokens, tokens, "trady")],
    ids=["cnn", "shared", "tokens"],
)
@every_kind
def test_equals_the_outer_optimizer_bit_for_bit(
    kind: str, build: Callable[[], nn.Module], batch: Callable[[int], Tensor], policy: str
) -> None:
    """Over draws, redraws while the ranking is being learnt, and a scheduler."""
    ends = []
    for make in (outer(kind), inside(kind)):
        tuner = prepared(build, batch, policy=policy)
        before = snapshot(tuner.model)
        optimizer = tuner.attach(make(tuner.parameters()))
        losses = train(tuner, optimizer, batch)
        ends.append((losses, tuner.selection.digest, optimizer, snapshot(tuner.finish())))
        assert sum(not torch.equal(before[name], ends[-1][3][name]) for name in before) > 2
    (losses, drawn, first, weights), (found, redrawn, second, updated) = ends
    assert losses == found
    assert drawn == redrawn
    assert same(weights, updated)
    assert_same_states(first, second)


def test_parameter_groups_keep_their_own_options() -> None:
    ends = []
    for make in (torch.optim.SGD, trady.optim.SGD):
        tuner = prepared()
        named = dict(tuner.named_parameters())
        channels = [p for name, p in named.items() if name.endswith(".channels")]
        groups = [
            {"params": channels[::2], "lr": 0.01, "momentum": 0.9},
            {"params": channels[1::2], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if not name.endswith(".channels")], "lr": 0.1},
        ]
        optimizer = tuner.attach(make(groups, lr=0.03))
        ends.append((train(tuner, optimizer), snapshot(tuner.finish())))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def test_two_optimizers_update_what_is_theirs() -> None:
    ends = []
    for module in (torch.optim, trady.optim):
        tuner = prepared()
        parameters = list(tuner.parameters())
        first = tuner.attach(module.SGD(parameters[::2], lr=0.05))
        second = tuner.attach(module.AdamW(parameters[1::2], lr=0.01))
        for step in range(4):
            loss_of(tuner.model, images(step)).backward()
            first.step()
            second.step()
            first.zero_grad()
            second.zero_grad()
        ends.append(snapshot(tuner.finish()))
    assert same(*ends)


def test_an_optimizer_that_is_attached_later_takes_over() -> None:
    tuner, other = prepared(), prepared()
    old = trady.optim.SGD(tuner.parameters(), lr=100.0)
    tuner.attach(old)
    train(tuner, tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.05)))
    train(other, other.attach(trady.optim.SGD(other.parameters(), lr=0.05)))
    assert old.gradient_norms == ()
    assert same(snapshot(tuner.finish()), snapshot(other.finish()))


def test_a_channel_is_updated_when_its_gradient_arrives_and_the_head_in_step() -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.05))
    named = dict(tuner.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    weights = snapshot(tuner.model)
    loss_of(tuner.model, images(0)).backward()
    for name, parameter in named.items():
        waits = not name.endswith(".channels")
        assert (parameter.grad is not None) == waits
        assert torch.equal(parameter, before[name]) == (waits or not len(parameter))
    assert same(snapshot(tuner.model), weights)
    optimizer.step()
    assert not torch.equal(named["head.weight"], before["head.weight"])
    assert not same(snapshot(tuner.model), weights)
    tuner.finish()


class ReadAgain(nn.Module):
    """The head's weight is read three times: as a classifier, tied to an embedding or not, and without a gradient."""

    def __init__(self, tied: bool, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.head = nn.Linear(width, 20, bias=False)
        nn.init.normal_(self.embedding.weight, 0, 0.2)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.embedding(ids).mean(1))
        # Saved for the gradient of x, which is computed after that of the weight.
        x = x + F.linear(x, self.head.weight.detach()[:12])
        x = x + self.down(F.gelu(x))
        return self.head(x + self.head(x) @ self.head.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_a_head_that_the_backward_pass_reads_again_trains_as_ever(kind: str, tied: bool) -> None:
    ends = []
    for make in (outer(kind), inside(kind)):
        tuner = prepared(lambda: ReadAgain(tied), tokens, head=("head",))
        ends.append((train(tuner, tuner.attach(make(tuner.parameters())), tokens), snapshot(tuner.finish())))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def test_a_closure_computes_the_gradients() -> None:
    ends = []
    for make in (outer("momentum"), inside("momentum")):
        tuner = prepared()
        optimizer = tuner.attach(make(tuner.parameters()))

        def closure(tuner: trady.Tuner = tuner, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            optimizer.zero_grad()
            loss = loss_of(tuner.model, images(0))
            loss.backward()
            return loss

        ends.append(
            ([float(torch.as_tensor(optimizer.step(closure)).detach()) for _ in range(3)], snapshot(tuner.finish()))
        )
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_hooks_run_once_a_step(kind: str) -> None:
    outer(kind)([nn.Parameter(torch.zeros(1))])  # torch wraps the step of a class when its first optimizer is made
    tuner = prepared()
    optimizer = tuner.attach(inside(kind)(tuner.parameters()))
    calls: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    try:
        train(tuner, optimizer, steps=range(3))
    finally:
        handle.remove()
    assert calls == [optimizer] * 3
    tuner.finish()


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_compact_gradients_are_freed_one_by_one(kind: str) -> None:
    ledgers = []
    for make in (outer(kind), inside(kind)):
        tuner = prepared(lambda: Residual(width=32, blocks=4), budget="elements:200000")
        optimizer = tuner.attach(make(tuner.parameters()))
        named = dict(tuner.named_parameters())
        sizes = [p.nbytes for name, p in named.items() if name.endswith(".channels")]
        head = sum(p.nbytes for name, p in named.items() if not name.endswith(".channels"))

        def step(tuner: trady.Tuner = tuner, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss_of(tuner.model, images(0)).backward()
            optimizer.step()
            optimizer.zero_grad()

        ledgers.append(tuner.ledger(step))
        tuner.finish()
    before, after = ledgers
    assert sum(sizes) > 3 * max(sizes)
    assert before.gradient_bytes == sum(sizes) + head
    assert max(sizes) <= after.gradient_bytes <= max(sizes) + head
    assert after.optimizer_state_bytes == before.optimizer_state_bytes
    assert after.peak_bytes <= before.peak_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_state_counts_in_the_budget_as_the_outer_optimizers_does(kind: str) -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    assert state_copies(inside(kind)(parameters)) == state_copies(outer(kind)(parameters))


def _wide() -> nn.Module:
    layers = (layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.ReLU()))
    return nn.Sequential(*layers, nn.Linear(128, 3))


@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_a_peak_budget_counts_on_gradients_that_are_freed(kind: str) -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    target = torch.arange(8) % 3
    counts = []
    for make in (outer(kind), inside(kind)):
        model = seeded(_wide)
        tuner = trady.prepare(model, (x,), budget="peak:900 KiB", policy="dynamic-random")
        optimizer = tuner.attach(make(tuner.parameters()))

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        measured = tuner.ledger(step, inference=False).peak_bytes - target.nbytes
        predicted = predicted_peak(tuner.plan)
        counts.append(tuner.selection.count)
        tuner.finish()
    assert measured <= 900 * 1024
    assert measured <= predicted <= 1.005 * measured
    assert counts[1] > 1.1 * counts[0]


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
@pytest.mark.parametrize("when", [1, 4, 6])
def test_a_restart_goes_on_bit_for_bit(kind: str, when: int) -> None:
    make = inside(kind, channel_clip=0.1, max_norm=0.5)

    def run(stop: int | None) -> tuple[list[float], dict[str, Tensor]]:
        tuner = prepared(policy="trady")
        optimizer = tuner.attach(make(tuner.parameters()))
        losses = train(tuner, optimizer, steps=range(9 if stop is None else stop), schedule=False)
        if stop is not None:
            file = io.BytesIO()
            torch.save((tuner.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            state, moments = torch.load(file, weights_only=True)
            tuner.finish()
            tuner = prepared(policy="trady")
            optimizer = tuner.attach(make(tuner.parameters()))
            tuner.load_state_dict(state)
            optimizer.load_state_dict(moments)
            losses += train(tuner, optimizer, steps=range(stop, 9), schedule=False)
        return losses, snapshot(tuner.finish())

    (expected, weights), (losses, restarted) = run(None), run(when)
    assert losses == expected
    assert same(weights, restarted)


@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
@pytest.mark.parametrize("there", [True, False])
def test_states_are_exchanged_with_torch(kind: str, there: bool) -> None:
    """A run begun with one goes on with the other, and ends where it would have ended."""
    makes = [outer(kind), inside(kind, channel_clip=None)]
    begin, go_on = makes if there else reversed(makes)
    whole, first = prepared(), prepared()
    expected = train(whole, whole.attach(outer(kind)(whole.parameters())), schedule=False)
    old = first.attach(begin(first.parameters()))
    train(first, old, steps=range(4), schedule=False)
    second = prepared()
    new = second.attach(go_on(second.parameters()))
    second.load_state_dict(first.state_dict())
    new.load_state_dict(old.state_dict())
    assert train(second, new, steps=range(4, 9), schedule=False) == expected[4:]
    assert same(snapshot(whole.finish()), snapshot(second.finish()))
    first.finish()


def test_the_limits_given_stay_when_a_state_of_torch_is_loaded() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    optimizer = trady.optim.SGD(parameters, lr=0.1, channel_clip=0.2, max_norm=3.0)
    optimizer.load_state_dict(torch.optim.SGD(parameters, lr=0.7).state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["channel_clip"], group["max_norm"]) == (0.7, 0.2, 3.0)


def test_a_copy_is_attached_to_nothing() -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.1))
    with pytest.raises(StateError, match=r"tuner\.attach"):
        copy.deepcopy(optimizer).step()
    tuner.finish()


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_second_backward_pass_before_the_step_is_refused() -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.05))
    loss_of(tuner.model, images(0)).backward()
    compact = {name: p.detach().clone() for name, p in tuner.named_parameters() if name.endswith(".channels")}
    with pytest.raises(StateError, match=r"torch\.optim\.SGD"):
        loss_of(tuner.model, images(1)).backward()
    assert all(torch.equal(p, compact[name]) for name, p in tuner.named_parameters() if name in compact)
    optimizer.step()
    optimizer.zero_grad()
    train(tuner, optimizer, schedule=False)
    tuner.finish()


class Recomputed(nn.Module):
    """One layer in two segments that are recomputed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(self.shared(x)), x, use_reentrant=self.reentrant)
        return self.head(x)


def test_a_layer_shared_between_recomputed_segments() -> None:
    """Its gradient arrives once, or, with reentrant checkpoints, twice, which is refused."""

    def batch(step: int) -> Tensor:
        return normal(4, 6, seed=step)

    ends = []
    for make in (outer("SGD"), inside("SGD")):
        tuner = prepared(lambda: Recomputed(False), batch)
        ends.append((train(tuner, tuner.attach(make(tuner.parameters())), batch), snapshot(tuner.finish())))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])
    tuner = prepared(lambda: Recomputed(True), batch, policy="full", budget="elements:100000")
    tuner.attach(kept := trady.optim.SGD(tuner.parameters(), lr=0.05))
    with pytest.raises(StateError, match="use_reentrant"):
        loss_of(tuner.model, batch(0)).backward()
    assert len(kept.gradient_norms)
    tuner.finish()


def test_an_optimizer_without_a_tuner_is_refused() -> None:
    model = seeded(Residual)
    optimizer = trady.optim.AdamW(model.parameters())
    loss_of(model, images(0)).backward()
    with pytest.raises(StateError, match=r"torch\.optim\.AdamW"):
        optimizer.step()


@pytest.mark.parametrize("fused", [None, True])
def test_a_gradient_scaler_is_refused(fused: bool | None) -> None:
    tuner = prepared()
    optimizer = tuner.attach(trady.optim.SGD(tuner.parameters(), lr=0.05, fused=fused))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(tuner.model, images(0))).backward()
    with pytest.raises(StateError, match="bfloat16"):
        scaler.step(optimizer)
    tuner.finish()


@pytest.mark.parametrize("options", [{"channel_clip": 0.0}, {"max_norm": -1.0}, {"max_norm": math.nan}])
def test_limits_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"more than zero"):
        trady.optim.SGD([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_a_gradient_that_is_not_finite_is_not_applied(kind: str) -> None:
    tuner = prepared()
    optimizer = tuner.attach(inside(kind, channel_clip=0.1, max_norm=1.0)(tuner.parameters()))
    train(tuner, optimizer, steps=range(2), schedule=False)
    before, moments = snapshot(tuner.model), states(optimizer)
    moments = {key: value.clone() for key, value in moments.items()}
    (loss_of(tuner.model, images(0)) * math.inf).backward()
    assert not math.isfinite(tuner.clip_gradients(0.1, None))
    optimizer.step()
    optimizer.zero_grad()
    assert same(snapshot(tuner.model), before)
    assert all(torch.equal(value, states(optimizer)[key]) for key, value in moments.items())
    assert all(math.isfinite(loss) for loss in train(tuner, optimizer, schedule=False))
    tuner.finish()


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw", "lr": 0.01}])
def test_a_run_by_name_ends_where_the_outer_optimizer_does(options: dict[str, Any], tmp_path: Path) -> None:
    def run(out: Path | None = None, epochs: int = 3, **more: Any) -> Any:
        return trady.finetune(
            small_net(), small_data(48, 0), small_data(24, 1), budget="update:12 KiB", epochs=epochs, batch_size=8,
            out=out, progress=False, **{"lr": 0.05, **options, **more},
        )  # fmt: skip

    expected, found = run(), run(optimizer=f"{options['optimizer']}-in-backward", out=tmp_path)
    assert [m.train_loss for m in found.history] == [m.train_loss for m in expected.history]
    assert same(snapshot(found.model), snapshot(expected.model))
    assert max(m.peak_bytes for m in found.history) <= max(m.peak_bytes for m in expected.history)


def test_a_run_without_a_tuner_is_refused() -> None:
    with pytest.raises(StateError, match=r"torch\.optim\.SGD"):
        trady.finetune(
            small_net(), small_data(48, 0), small_data(24, 1), epochs=1, batch_size=8, out=None, progress=False,
            policy="full", optimizer="sgd-in-backward",
        )  # fmt: skip
