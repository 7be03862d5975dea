"""Several processes train what one process trains on their batches together."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trady
from tests.distributed_training import Told, Training
from tests.models import Residual, normal, same, seeded, snapshot
from tests.ranks import Raised, Scenario, together
from trady.process.ranks import average_, buffer_bytes

#: These end where one process does.
ALIKE = {
    "CNN": Training(),
    "CNN, AdamW, three passes": Training(optimizer=partial(torch.optim.AdamW, lr=0.01), accumulation=3),
    "BERT, recomputed": Training("BERT", "all"),
    "Llama, nothing recomputed": Training("Llama, loss", "none", partial(torch.optim.AdamW, lr=0.01)),
    "Llama, recomputed, three passes": Training("Llama, loss", "all", accumulation=3),
    "CNN, updates in the backward pass": Training(optimizer=partial(trady.optim.SGD, lr=0.05, momentum=0.9)),
    "BERT, updates in the backward pass": Training("BERT", "all", partial(trady.optim.AdamW, lr=0.01)),
    "wrapped after": Training(wrap="after", accumulation=2),
    "wrapped before": Training(wrap="before", accumulation=2),
    "wrapped after, without a head": Training("BERT", head=[], wrap="after"),
    "wrapped before, without a head": Training("BERT", head=[], wrap="before"),
}


def uneven_updates(rank: int, processes: int) -> Told:
    made = Training("BERT", "all", partial(trady.optim.SGD, lr=0.05), uneven=True)
    return made(rank, processes)


class Branches(nn.Module):
    """Layers of which each process uses another one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.never, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        y: Tensor = self.head(self.left(x) + self.right(x) + self.never(x))
        return y


def other_layers(rank: int, processes: int) -> dict[str, Any]:
    """A gradient that one process has, and one that none has."""
    model = seeded(Branches)
    tuner = trady.prepare(model, normal(4, 6), budget="elements:100000", policy="full")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1, weight_decay=0.1))
    before = snapshot(model)
    compact = dict(tuner.named_parameters())
    with tuner.no_sync():
        model(normal(4, 6, seed=rank)).square().mean().backward()
    for name in ("left", "right")[rank], "never":
        compact[f"{name}.weight.channels"].grad = None
    optimizer.step()
    return {"before": before, "after": snapshot(tuner.finish())}


def step_after_no_sync(rank: int, processes: int) -> dict[str, Tensor]:
    model = seeded(Residual)
    tuner = trady.prepare(model, normal(2, 3, 9, 9), budget="elements:900", seed=3, ranking="structural")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    with tuner.no_sync():
        model(normal(2, 3, 9, 9, seed=rank)).square().mean().backward()
    optimizer.step()
    return snapshot(tuner.finish())


def micro_batches(rank: int, processes: int) -> tuple[int, int]:
    model, x = seeded(Residual), normal(6, 3, 9, 9)
    tuner = trady.prepare(model, x, budget="elements:900", seed=3, ranking="structural", micro_batch=2)

    def step() -> None:
        for part, share in tuner.micro_batches(x):
            (model(part).square().mean() * share).backward()

    ledger = tuner.ledger(step, inference=False)
    tuner.finish()
    return ledger.averaging_calls, ledger.averaged_bytes


def wrapped_after_the_end(rank: int, processes: int) -> dict[str, Tensor]:
    """A wrapper goes on averaging all that trains when the tuner has given the model back."""
    model = seeded(Residual)
    wrapped = DistributedDataParallel(model)
    tuner = trady.prepare(model, normal(2, 3, 9, 9), budget="elements:900", seed=3, ranking="structural")
    wrapped(normal(2, 3, 9, 9, seed=rank)).square().mean().backward()
    tuner.finish()
    model.zero_grad()
    for step in range(3):
        wrapped(normal(2, 3, 9, 9, seed=5 * step + rank)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differing(rank: int, processes: int, **options: Any) -> None:
    """Train with options of which each process has another one."""
    torch.manual_seed(0)
    model = seeded(Residual, seed=options.pop("weights", (0, 0))[rank])
    kind = options.pop("optimizer", ("SGD", "SGD"))[rank]
    given = {name: value[rank] for name, value in options.items()}
    asked = {"budget": "elements:900", "seed": 3, "ranking": "structural", **given}
    tuner = trady.prepare(model, normal(2, 3, 9, 9), **asked)
    optimizer = tuner.attach(getattr(torch.optim, kind)(tuner.parameters(), lr=0.1))
    before = snapshot(model)
    try:
        model(normal(2, 3, 9, 9)).square().mean().backward()
        optimizer.step()
    finally:
        assert same(before, snapshot(model))


class Other(Residual):
    """Another model of the same channels."""


def other_version(rank: int, processes: int, *, package: str) -> None:
    """Train with another version of a package on rank 1."""
    module = sys.modules[package]
    with patch.object(module, "__version__", "1.2.3" if rank else "1.2.4"):
        differing(rank, processes)


def other_model(rank: int, processes: int) -> None:
    """Train another model on rank 1."""
    model = seeded((Residual, Other)[rank])
    tuner = trady.prepare(model, normal(2, 3, 9, 9), budget="elements:900", seed=3, ranking="structural")
    tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    model(normal(2, 3, 9, 9)).square().mean().backward()


DIFFERING: dict[str, tuple[Scenario, str]] = {
    "a version of torch": (partial(other_version, package="torch"), "the version of torch is 1.2.4 on rank 0, 1.2.3"),
    "a version of numpy": (partial(other_version, package="numpy"), "the version of numpy is 1.2.4 on rank 0, 1.2.3"),
    "a version of trady": (
        partial(other_version, package="trady.tuner.agreement"),
        "the version of trady is 1.2.4 on rank 0, 1.2.3",
    ),
    "the model": (other_model, "the model's structure is Residual"),
    "the optimizer": (partial(differing, optimizer=("SGD", "Adam")), "the optimizer is SGD on rank 0, Adam on rank 1"),
    "seed": (partial(differing, seed=(3, 4)), "seed is 3 on rank 0, 4 on rank 1"),
    "budget": (
        partial(differing, budget=("elements:900", "elements:950")),
        "budget is elements:900 on rank 0, elements:950 on rank 1",
    ),
    "weights": (partial(differing, weights=(0, 1)), "a sum over the weights is"),
    "policy": (partial(differing, policy=("static-random", "trady")), "policy is static-random on rank 0"),
}

OTHERS: dict[str, Scenario] = {
    "uneven": Training("BERT", "all", uneven=True),
    "uneven updates": uneven_updates,
    "other layers": other_layers,
    "step after no_sync": step_after_no_sync,
    "micro_batches": micro_batches,
    "wrapped after the end": wrapped_after_the_end,
    **{name: scenario for name, (scenario, _) in DIFFERING.items()},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together({**ALIKE, **OTHERS}, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_end_where_one_does(two: dict[str, list[Any]], name: str) -> None:
    first, second = two[name]
    assert isinstance(first, Told), first
    alone = ALIKE[name](0, 1) if not ALIKE[name].wrap else Training(**{**vars(ALIKE[name]), "wrap": ""})(0, 1)
    assert same(first.weights, second.weights)
    assert first.selections == second.selections == alone.selections
    for mine, others, ours in zip(first.losses, second.losses, alone.losses, strict=True):
        assert (mine + others) / 2 == pytest.approx(ours, rel=1e-9)
    for key, value in alone.weights.items():
        torch.testing.assert_close(first.weights[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["CNN, AdamW, three passes", "Llama, recomputed, three passes", "wrapped after"])
def test_several_passes_a_step_are_averaged_once(two: dict[str, list[Any]], name: str) -> None:
    told = two[name][0]
    assert set(told.calls) == {1}


def test_channels_and_head_go_together(two: dict[str, list[Any]]) -> None:
    model = seeded(Residual).double()
    tuner = trady.prepare(
        model, normal(12, 3, 9, 9, dtype=torch.float64), budget="elements:1500", seed=3, ranking="structural"
    )
    trained = [p for p in tuner.parameters() if p.numel()]
    assert two["CNN"][0].nbytes[0] == sum(p.nbytes for p in trained) + 8 * len(trained)
    assert two["CNN"][0].calls == [1] * 4
    tuner.finish()


@pytest.mark.parametrize("name", ["uneven", "uneven updates"])
def test_batches_of_other_lengths_are_averaged_in_the_same_order(two: dict[str, list[Any]], name: str) -> None:
    first, second = two[name]
    assert isinstance(first, Told), first
    assert same(first.weights, second.weights)
    assert first.losses != second.losses


def test_a_gradient_that_only_one_process_has_counts_and_one_that_none_has_does_not(
    two: dict[str, list[Any]],
) -> None:
    first, second = two["other layers"]
    assert not isinstance(first, Raised), first
    assert same(first["after"], second["after"])
    changed = {name for name in first["before"] if not torch.equal(first["before"][name], first["after"][name])}
    assert {"left.weight", "right.weight"} <= changed
    assert "never.weight" not in changed


def test_a_step_averages_what_waits(two: dict[str, list[Any]]) -> None:
    first, second = two["step after no_sync"]
    assert not isinstance(first, Raised), first
    assert same(first, second)
    assert not same(first, snapshot(seeded(Residual)))


def test_parts_of_a_batch_are_averaged_once(two: dict[str, list[Any]]) -> None:
    calls, nbytes = two["micro_batches"][0]
    assert calls == 1
    assert nbytes > 0


def test_a_wrapper_averages_everything_again_when_the_tuner_has_finished(two: dict[str, list[Any]]) -> None:
    first, second = two["wrapped after the end"]
    assert not isinstance(first, Raised), first
    assert first.keys() == {name for name, _ in Residual().named_parameters()}
    assert same(first, second)


@pytest.mark.parametrize("name", DIFFERING)
def test_processes_that_would_train_something_else_are_refused_together(two: dict[str, list[Any]], name: str) -> None:
    for told in two[name]:
        assert isinstance(told, Raised)
        assert told.kind == "StateError", told
        assert DIFFERING[name][1] in told.text
        assert "rank 1" in told.text


def _averages(rank: int, processes: int) -> tuple[list[Tensor], int, int]:
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    tensors = [torch.full((97, 40 * (i % 3)), float(rank + i), dtype=kinds[i % 2 + i // 20]) for i in range(40)]
    tensors += [torch.full((2000, 1500), float(rank)), torch.full((3, 500), float(rank)).t()]
    traffic = average_(tensors)
    return tensors, traffic.nbytes, traffic.calls


def test_an_average_over_four_processes_is_one_of_each_tensor(tmp_path: Path) -> None:
    told = together({"averages": _averages}, tmp_path, 4)["averages"]
    tensors, nbytes, calls = told[0]
    assert nbytes == sum(t.nbytes for t in tensors)
    assert calls < 10
    for i, tensor in enumerate(tensors):
        start = i if i < 40 else 0
        assert torch.equal(tensor, torch.full_like(tensor, start + 1.5))
        assert all(torch.equal(tensor, other[0][i]) for other in told)


def test_what_an_average_takes_is_bounded() -> None:
    megabyte = 1 << 20
    assert buffer_bytes([megabyte, 2 * megabyte]) == 3 * megabyte
    assert buffer_bytes([100 * megabyte]) == 0
    assert buffer_bytes([megabyte] * 100) == 8 * megabyte
