"""The velocity policy: what it measures, what it draws from it, what that costs, and that a restart changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import trady
from tests.models import IMAGE_NETWORKS, Tokens, normal, seeded, snapshot
from tests.small_task import small_data, small_net
from trady.channels.table import ChannelTable, Layer, by_output
from trady.errors import StateError
from trady.evidence.velocity import MOMENTUM
from trady.memory.live import LiveBytes
from trady.planning.budget import InfeasibleBudgetError
from trady.policies import Draw, Evidence, draw_selection, get_policy
from trady.policies.output_channels import by_unit, costs, unit_weights

BUDGET = "elements:2500"


def samples(shape: tuple[int, ...] = (3, 9, 11), batches: int = 2, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(normal(size, *shape, seed=s), torch.arange(size).remainder(3)) for s in range(batches)]


def prepared(budget: str = BUDGET, seed: int = 0) -> trady.Tuner:
    build, shape = IMAGE_NETWORKS["residual"]
    return trady.prepare(seeded(build), normal(3, *shape), budget=budget, policy="velocity", seed=seed)


def epoch(tuner: trady.Tuner, number: int, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    tuner.observe(data)
    tuner.resample(number)
    for x, y in data:
        F.cross_entropy(tuner.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def maps_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """Output maps by module, each sample [outputs, positions], from forward hooks."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: found.setdefault(name, []).append(out.detach().clone()[0].flatten(1).double())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model.eval()
    with torch.no_grad():
        for x, _ in data:
            for sample in x:
                model(sample[None])
    for handle in handles:
        handle.remove()
    return found


def test_the_velocity_is_the_papers() -> None:
    tuner, data = prepared(), samples()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    maps, velocities = [], []
    for number in range(4):
        tuner._armed.write_back()
        maps.append(maps_of(copy.deepcopy(_plain(tuner)), data))
        epoch(tuner, number, optimizer, data)
        assert tuner._draws.moment.evidence is not None
        velocities.append(tuner._draws.moment.evidence)
    names = [layer.name for layer in tuner.plan.table if layer.name in maps[0]]
    assert len(names) > 3
    for name in names:
        phi, velocity = [torch.ones(maps[0][name][0].shape[0], dtype=torch.float64)], torch.zeros(1)
        for t in range(1, 4):
            pairs = zip(maps[t][name], maps[t - 1][name], strict=True)
            phi.append(torch.stack([F.cosine_similarity(a, b, dim=1) for a, b in pairs]).mean(0))
            velocity = phi[t] - phi[t - 1] - MOMENTUM * velocity
            found = velocities[t]["velocity"][name]
            assert np.allclose(found, velocity.numpy(), rtol=0, atol=1e-6), (name, t)
    assert all((velocities[0]["velocity"][name] == 0).all() for name in names)
    assert max(np.abs(velocities[3]["velocity"][name]).max() for name in names) > 1e-4
    tuner.finish()


def _plain(tuner: trady.Tuner) -> nn.Module:
    model = seeded(IMAGE_NETWORKS["residual"][0])
    model.load_state_dict(snapshot(tuner.model))
    return model


def test_a_neuron_that_does_not_move_has_no_velocity() -> None:
    tuner, data = prepared(), samples()
    tuner.observe(data)
    tuner.resample(0)
    found = tuner.observe(data)
    assert found is not None
    assert all(np.abs(v).max() < 1e-6 for v in found["velocity"].values())
    tuner.finish()


def test_a_layer_over_vectors_is_compared_over_the_samples() -> None:
    first = nn.Linear(5, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 3))
    data = [(normal(6, 5), torch.zeros(6, dtype=torch.long))]
    tuner = trady.prepare(model, data[0][0], budget="elements:1000", policy="velocity")
    tuner.observe(data)
    before = first(data[0][0]).detach()
    tuner.resample(0)
    with torch.no_grad():
        first.weight.add_(normal(4, 5, seed=3))
    found = tuner.observe(data)
    assert found is not None
    expected = F.cosine_similarity(model[0](data[0][0]).detach(), before, dim=0) - 1
    assert np.allclose(found["velocity"]["0"], expected.double().numpy(), atol=1e-5)
    tuner.finish()


def test_the_fastest_neurons_for_their_weight_train_and_whole_maps_are_paid() -> None:
    layers = [
        Layer("a", "a.weight", "conv2d", 4, 8, 50, 1, (8, 4, 1, 1), ((1, 4),), ((1, 8),)),
        Layer("b", "b.weight", "conv2d", 10, 3, 20, 1, (3, 10, 1, 1), ((1, 10),), ((1, 3),)),
        Layer("c", "c.weight", "conv2d", 6, 9, 16, 1, (6, 1, 3, 3), ((1, 6),), ((1, 6),), 6),
    ]
    table = ChannelTable(tuple(layers))
    velocity = {"a": np.arange(8) / 100, "b": np.array([-3.0, 0.0, 0.5]), "c": np.array([0, 0, 0, 0, 0, 1.0])}
    prices = {layer.name: layer.elements for layer in layers}
    evidence = Evidence({"velocity": velocity})

    def drawn(capacity: int) -> trady.Selection:
        return draw_selection(
            get_policy("velocity"), Draw(table, table.names, prices, capacity, 0, 1, evidence=evidence)
        )

    # Per weight: b0 has 0.3, c5 0.111, b2 0.05, a7 0.0175; b's map takes 200, a neuron of it 10; c5 takes 25.
    assert drawn(210) == by_output(table, {"b": [0]})
    assert drawn(235) == by_output(table, {"b": [0], "c": [5]})
    assert drawn(245) == by_output(table, {"b": [0, 2], "c": [5]})
    # b does not fit: the next are taken.
    assert drawn(34) == by_output(table, {"c": [5]})
    assert drawn(10_000) == by_output(table, {layer.name: np.arange(layer.outputs) for layer in layers})
    assert by_unit(layers[2], np.abs(velocity["c"])).tolist() == [0, 0, 0, 0, 0, 1]
    assert [unit_weights(layer) for layer in layers] == [4, 10, 9]
    assert costs(Draw(table, (), prices, None, 0, 0), layers[0]) == (200, 4)


def test_the_first_epoch_is_drawn_at_random_and_the_same_again() -> None:
    data = samples()
    first, again, other = (prepared(seed=s) for s in (0, 0, 1))
    for tuner in (first, again, other):
        assert len(tuner.selection) == 0
        tuner.observe(data)
    assert first.selection == again.selection != other.selection
    assert first.selection.outputs
    assert 0 < first.cost().elements <= 2500
    for tuner in (first, again, other):
        tuner.finish()


def test_neurons_train_and_the_ledger_has_their_whole_maps() -> None:
    tuner, data = prepared(), samples()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    drawn = []
    for number in range(3):
        epoch(tuner, number, optimizer, data)
        drawn.append(tuner.selection)
        x, y = data[0]
        ledger = tuner.ledger(lambda: F.cross_entropy(tuner.model(x), y).backward())  # noqa: B023
        assert ledger.saved_bytes_of("channels") == tuner.cost().saved_channel_bytes > 0
        optimizer.zero_grad()
    assert len(set(drawn)) > 1
    tuner.finish()


@pytest.mark.parametrize("budget", [BUDGET, "update:64 KiB"])
def test_a_restart_ends_bit_for_bit_where_the_unbroken_run_does(budget: str) -> None:
    data = samples()

    def begun() -> tuple[trady.Tuner, torch.optim.Optimizer]:
        tuner = prepared(budget)
        return tuner, torch.optim.SGD(tuner.parameters(), lr=0.05, momentum=0.9)

    tuner, optimizer = begun()
    tuner.attach(optimizer)
    for number in range(2):
        epoch(tuner, number, optimizer, data)
    state = copy.deepcopy((tuner.state_dict(), optimizer.state_dict()))
    for number in range(2, 4):
        epoch(tuner, number, optimizer, data)
    selection, expected = tuner.selection, tuner.finish()

    tuner, optimizer = begun()
    tuner.load_state_dict(state[0])
    tuner.attach(optimizer)
    optimizer.load_state_dict(state[1])
    for number in range(2, 4):
        epoch(tuner, number, optimizer, data)
    assert tuner.selection == selection
    assert all(torch.equal(a, b) for a, b in zip(tuner.finish().parameters(), expected.parameters(), strict=True))


def test_observing_changes_nothing_and_says_what_it_keeps() -> None:
    tuner, data = prepared(), samples()
    tuner.model.train()
    before, random = snapshot(tuner.model), torch.get_rng_state()
    found = tuner.observe(data)
    assert found is not None
    assert all(module.training for module in tuner.model.modules() if not isinstance(module, nn.BatchNorm2d))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(tuner.model).items())
    assert found.carried_bytes == 8 * sum(layer.outputs for layer in tuner.plan.table) + 32  # a mean each, and a digest
    tuner.finish()


def test_looking_back_leaves_the_bits_of_every_weight() -> None:
    tuner, data = prepared(), samples()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    for number in range(2):
        epoch(tuner, number, optimizer, data)
    before = snapshot(tuner.model)
    seen: list[dict[str, Tensor]] = []
    restored = tuner._snapshot.restored  # type: ignore[union-attr]
    with restored():
        seen.append(snapshot(tuner.model))
    after = snapshot(tuner.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(seen[0][name], tensor) for name, tensor in before.items())
    tuner.finish()


@pytest.mark.parametrize("head", ["auto", None])
def test_several_draws_between_two_looks_are_all_taken_back(head: str | None) -> None:
    build, shape = IMAGE_NETWORKS["residual"]
    tuner = trady.prepare(seeded(build), normal(3, *shape), budget=BUDGET, policy="velocity", head=head)
    data = samples()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    tuner.observe(data)
    tuner.resample(0)
    then = snapshot(tuner.model)
    for number in range(3):
        tuner._draws.apply(
            tuner._decision.draw(tuner._draws.moment, number, 0)
        )  # overlapping neurons, none of them measured in between
        F.cross_entropy(tuner.model(data[0][0]), data[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with tuner._snapshot.restored():  # type: ignore[union-attr]
        back = snapshot(tuner.model)
    assert all(torch.equal(back[name], tensor) for name, tensor in then.items())
    assert any(not torch.equal(snapshot(tuner.model)[name], tensor) for name, tensor in then.items())
    tuner.finish()


def test_the_copy_to_look_back_with_is_in_the_plan_and_in_the_ledger() -> None:
    tuner, data = prepared("update:64 KiB"), samples()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    for number in range(2):
        epoch(tuner, number, optimizer, data)
    cost, head = tuner.cost(), 4 * tuner.plan.head_parameters
    assert cost.update_bytes == cost.saved_channel_bytes + 3 * cost.compact_bytes <= 64 * 1024
    ledger = tuner.ledger(lambda: F.cross_entropy(tuner.model(data[0][0]), data[0][1]).backward())
    assert ledger.parts["compact parameters"] >= 2 * cost.compact_bytes + head
    tuner.finish()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "in-backward"])
def test_a_peak_budget_holds_while_it_trains_and_while_it_looks(optimizer: str) -> None:
    build, shape = IMAGE_NETWORKS["residual"]
    model, x, y = seeded(build), normal(16, *shape), torch.zeros(16, dtype=torch.int64)
    generous = trady.plan(model, x, budget="peak:1 GiB", policy="full").predicted_peak_bytes
    assert generous is not None
    amount = int(0.8 * generous)
    tuner = trady.prepare(model, x, budget=f"peak:{amount} B", policy="velocity")
    kind = trady.optim.AdamW if optimizer == "in-backward" else getattr(torch.optim, optimizer)
    made = tuner.attach(kind(tuner.parameters(), lr=0.01))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        made.step()
        made.zero_grad()

    for number in range(3):
        assert tuner.ledger(lambda: tuner.observe([(x, y)]), inference=False).peak_bytes <= amount
        tuner.resample(number)
        predicted = tuner.plan.predicted_peak_bytes
        peak = tuner.ledger(step, inference=False).peak_bytes
        assert predicted is not None
        assert 0.97 * peak <= predicted <= amount
    assert tuner.selection.count
    tuner.finish()


def test_other_samples_than_an_epoch_ago_are_refused() -> None:
    tuner = prepared()
    tuner.observe(samples())
    tuner.resample(0)
    for wrong in (samples(batches=1), [(x + 1, y) for x, y in samples()], samples((3, 9, 9))):
        with pytest.raises(StateError, match="these are other samples"):
            tuner.observe(wrong)
    tuner.finish()


@pytest.mark.parametrize("budget", ["elements:{}", "update:{} B", "peak:{} B"])
def test_a_budget_too_small_for_a_neuron_is_refused_with_the_least_and_that_works(budget: str) -> None:
    with pytest.raises(InfeasibleBudgetError) as refused:
        prepared(budget.format(1))
    least = refused.value.least_amount
    with pytest.raises(InfeasibleBudgetError):
        prepared(budget.format(least - 1))
    tuner = prepared(budget.format(least))
    tuner.observe(samples())
    assert len(tuner.selection) == 1
    tuner.finish()


@pytest.mark.parametrize("name", ["grouped", "shared layer", "conv1d", "functional", "tokens"])
def test_on_networks_of_all_kinds(name: str) -> None:
    if name == "tokens":
        model: nn.Module = seeded(Tokens)
        data: list[Any] = [(torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0)), torch.arange(3))]
    else:
        build, shape = IMAGE_NETWORKS[name]
        model, data = seeded(build), samples(shape, 1)
    tuner = trady.prepare(model, data[0][0], budget="elements:3000", policy="velocity")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    for number in range(3):
        epoch(tuner, number, optimizer, data)
        assert 0 < tuner.cost().elements <= 3000
    tuner.finish()


class Augmented(Dataset[Any]):
    """Every look at an image is another one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        image, label = self.data[index]
        return image + torch.rand(1), label


def test_a_run_looks_at_the_same_samples_in_every_epoch_although_its_data_is_augmented() -> None:
    data = Augmented(small_data(24, 0)), small_data(12, 1)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05, "progress": False, "out": None}
    result = trady.finetune(small_net(), *data, budget="elements:2500", policy="velocity", **options)
    assert len({epoch.selection_hash for epoch in result.history}) == 2


def test_no_more_than_thirty_two_samples_are_looked_at() -> None:
    tuner = prepared()
    first, second = samples(size=20)
    found = tuner.observe([first, second, second])
    assert found is not None
    assert found.batches == 2
    tuner.resample(0)
    tuner.observe([first, second])
    tuner.finish()


@pytest.mark.parametrize(("samples", "size"), [(1, 32), (4, 16)])
def test_observing_stays_inside_the_budget(samples: int, size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    x, y = torch.randn(samples, 3, size, size), torch.zeros(samples, dtype=torch.int64)
    with pytest.raises(trady.BudgetError) as refused:
        trady.plan(model, x, budget="1 B", policy="velocity")
    budget = int(1.1 * refused.value.least_amount)  # type: ignore[attr-defined]
    tuner = trady.prepare(model, x, budget=f"{budget} B", policy="velocity")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    for epoch in range(3):
        with LiveBytes() as live:
            live.register([*model.parameters(), *model.buffers(), *tuner.parameters(), x, y])
            before = live.current
            tuner.observe([(x, y)], F.cross_entropy)
        assert live.peak <= budget
        copies = sum(p.nbytes for p in tuner.parameters()) + sum(index.nbytes for index in tuner._armed.indices)
        assert live.current <= before + 2 * copies  # nothing but a copy of what trains is left, and of what is next
        if epoch:
            tuner.resample(epoch)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
