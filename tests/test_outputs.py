"""Selections by output channel (neuron): real gradients, real memory, state that follows both axes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trady
from tests.models import IMAGE_NETWORKS, Tokens, freeze_norms, gradient_errors, normal, relative_error, seeded, snapshot
from tests.neurons import Fixed, Neurons, picked
from tests.recomputed_models import VisionTransformer, bert, loss_of, tokens
from trady.analysis.model_analysis import analyse_model
from trady.channels.cost import cost_of
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable, Layer, by_output
from trady.errors import CheckpointError, ModelError, PolicyError
from trady.optim.clipping import clip_by_output, clip_channels_
from trady.policies import Draw, draw_selection
from trady.policies.output_channels import costs, fill_output_channels, one_of_each, unit_count, unit_selection
from trady.simulation.simulator import Simulator

EVERYTHING = "elements:100000000000"


def constant(selection: Selection) -> Callable[[ChannelTable], Selection]:
    return lambda table: selection


def network(name: str) -> tuple[nn.Module, Any]:
    if name == "tokens":
        return seeded(Tokens).double(), torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    build, shape = IMAGE_NETWORKS[name]
    return seeded(build).double(), normal(3, *shape, dtype=torch.float64)


NETWORKS = [*IMAGE_NETWORKS, "tokens"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_selected_neurons_have_the_dense_gradient(name: str, train: bool) -> None:
    model, x = network(name)
    errors = gradient_errors(model, x, share=1, budget=EVERYTHING, train=train, policy=Neurons())
    assert len(errors) > 2
    assert max(errors.values()) <= 1e-10


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["residual", "pre-activation", "grouped", "shared layer", "conv1d", "tokens"])
def test_of_some_inputs_of_some_neurons_too(name: str, fuse: bool) -> None:
    model, x = network(name)
    errors = gradient_errors(
        model, x, share=1, budget=EVERYTHING, policy=Neurons(rectangle=name != "grouped"), fuse=fuse
    )
    assert max(errors.values()) <= 1e-10


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_in_segments_that_are_computed_anew(recompute: str) -> None:
    model, x = seeded(VisionTransformer).double(), normal(5, 3, 32, 32, dtype=torch.float64)
    errors = gradient_errors(model, x, share=1, budget=EVERYTHING, policy=Neurons(0.2), recompute=recompute)
    assert max(errors.values()) <= 1e-10


def test_when_the_narrowed_gradient_is_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.ops.layer.CHUNK_BYTES", 64)
    monkeypatch.setattr("trady.ops.layout.CHUNK_BYTES", 64)
    model, x = network("residual")
    assert max(gradient_errors(model, x, share=1, budget=EVERYTHING, policy=Neurons()).values()) <= 1e-10


@pytest.mark.parametrize("name", ["residual", "grouped", "shared weight", "tokens"])
def test_a_step_changes_the_selected_neurons_as_the_dense_model_and_nothing_else(name: str) -> None:
    model, x = network(name)
    dense, before = copy.deepcopy(model).requires_grad_(True), snapshot(model)
    freeze_norms(dense)
    dense(x).square().sum().backward()
    tuner = trady.prepare(model, x, budget=EVERYTHING, policy=Neurons())
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    model(x).square().sum().backward()
    optimizer.step()
    selection, table = tuner.selection, tuner.plan.table
    head = {n for n, p in model.named_parameters() if p.requires_grad}
    tuner.finish()
    assert selection.outputs
    by_parameter = {layer.parameter: layer for layer in table}
    for name, parameter in dense.named_parameters():
        mask = torch.ones_like(parameter) if name in head else torch.zeros_like(parameter)
        layer = by_parameter.get(name)
        if layer is not None and layer.name in selection:
            mask = mask_of(layer, selection)
        expected = before[name] - 0.01 * mask * (0 if parameter.grad is None else parameter.grad)
        now = model.get_parameter(name)
        assert torch.equal(now[mask == 0], before[name][mask == 0]), name
        assert torch.allclose(now, expected, rtol=1e-10, atol=1e-12), name


def mask_of(layer: Layer, selection: Selection) -> Tensor:
    """One where the weight trains."""
    inputs, outputs = torch.zeros(layer.channels), torch.ones(layer.outputs)
    inputs[torch.from_numpy(selection[layer.name].copy())] = 1
    if layer.name in selection.outputs:
        outputs = torch.zeros(layer.outputs).index_fill(0, torch.from_numpy(selection.outputs[layer.name].copy()), 1)
    a_group = layer.channels // layer.groups
    matrix = torch.zeros(layer.outputs, a_group)
    for output in range(layer.outputs):
        group = output // (layer.outputs // layer.groups)
        matrix[output] = outputs[output] * inputs[group * a_group : (group + 1) * a_group]
    matrix = matrix.t() if layer.kind == "addmm" else matrix
    return matrix.reshape(*matrix.shape, *(1,) * (len(layer.weight_shape) - 2)).expand(layer.weight_shape).double()


# -- what a selection is ---------------------------------------------------------------------------


def test_hashes_of_selections_by_input_channel_are_what_they_were() -> None:
    digest = hashlib.sha256()
    for name, indices in (("a", [1, 4]), ("b", [0])):
        digest.update(name.encode() + b"\0" + np.array(indices).astype("<i8").tobytes())
    selection = picked({"b": [0], "a": [4, 1]})
    assert selection.digest == digest.hexdigest()[:16]
    assert selection.to_json() == {"a": [1, 4], "b": [0]} == Selection.from_json(selection.to_json()).to_json()


def test_outputs_are_part_of_a_selection() -> None:
    inputs = {"a": [0, 1], "b": [2]}
    plain, chosen = picked(inputs), picked(inputs, {"a": [3, 1, 3]})
    assert plain != chosen != picked(inputs, {"b": [1, 3]})
    assert chosen == picked(inputs, {"a": [1, 3]})
    assert Selection.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    assert chosen.output_count("a") == 2
    assert chosen.output_count("b") is None
    assert picked(inputs, {"a": []}) == picked({"b": [2]})


def test_outputs_without_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"output channels of b are selected.*trady\.by_output"):
        picked({"a": [0]}, {"b": [1]})


@pytest.mark.parametrize("damaged", [[1], {"a": {"channels": [1]}}, {"a": {"channels": [1], "outputs": [0], "x": 1}}])
def test_a_damaged_selection_is_refused(damaged: Any) -> None:
    with pytest.raises(ValueError, match="selection"):
        Selection.from_json(damaged)


def test_both_of_two_selections() -> None:
    left = picked({"a": [0, 1], "b": [0], "c": [5]}, {"a": [1], "c": [2]})
    right = picked({"a": [3], "b": [1], "d": [0]}, {"a": [0], "b": [7], "d": [4]})
    both = picked({"a": [0, 1, 3], "b": [0, 1], "c": [5], "d": [0]}, {"a": [0, 1], "c": [2], "d": [4]})
    assert left | right == both == right | left


def test_a_neuron_takes_all_inputs_of_its_layer_and_a_depthwise_one_its_own_map() -> None:
    model, x = network("grouped")
    table = trady.plan(model, x, budget=EVERYTHING, policy=Neurons()).table
    kinds = {"depthwise": 0, "grouped": 0, "dense": 0}
    for layer in table:
        selection = by_output(table, {layer.name: [layer.outputs - 1]})
        a_group = layer.channels // layer.groups
        assert selection[layer.name].tolist() == list(range(layer.channels - a_group, layer.channels))
        assert (layer.name in selection.outputs) == (layer.groups == 1)
        kinds["dense" if layer.groups == 1 else "depthwise" if a_group == 1 else "grouped"] += 1
    assert all(kinds.values())


def test_all_neurons_are_all_channels() -> None:
    model, x = network("residual")
    table = trady.plan(model, x, policy="full").table
    every = by_output(table, {layer.name: np.arange(layer.outputs) for layer in table})
    assert every == Selection({layer.name: np.arange(layer.channels) for layer in table})
    with pytest.raises(ModelError, match="has output channels 0 to"):
        by_output(table, {table.names[0]: [table.layers[0].outputs]})


def test_a_policy_that_selects_outputs_that_are_not_there_is_refused() -> None:
    model, x = network("grouped")
    table = trady.plan(model, x, budget=EVERYTHING, policy=Neurons()).table
    plain = next(layer for layer in table if layer.groups == 1)
    grouped = next(layer for layer in table if layer.groups > 1)
    prices = {layer.name: layer.elements for layer in table}
    for layer, outputs, said in (
        (plain, [0, plain.outputs], f"output channel {plain.outputs} of layer '{plain.name}', which has"),
        (plain, [-1], "output channel -1 of layer"),
        (grouped, [0], f"output channels of layer '{grouped.name}', a convolution of {grouped.groups} groups"),
    ):
        selection = picked({layer.name: [0]}, {layer.name: outputs})
        wrong = Fixed(constant(selection))
        with pytest.raises(PolicyError, match="policy 'fixed' selected ") as refused:
            draw_selection(wrong, Draw(table, table.names, prices, None, 0, 0))
        assert said in str(refused.value)


# -- accounting ------------------------------------------------------------------------------------


def test_whole_maps_and_the_weights_of_the_neurons_are_accounted() -> None:
    layer = Layer("a", "a.weight", "conv2d", 6, 9 * 8, 25, 9 * 8 * 25, (8, 6, 3, 3), ((2, 6, 5, 5),), ((2, 8, 5, 5),))
    table = ChannelTable((layer,), batch=2)
    cost = cost_of(table, by_output(table, {"a": [1, 4]}), 1)
    weights, maps = 2 * 6 * 9, 6 * 25
    assert cost.elements == weights + maps == table.elements(by_output(table, {"a": [1, 4]}))
    assert cost.saved_channel_bytes == maps * 2 * 4
    assert cost.compact_bytes == weights * 4
    assert cost.update_bytes == maps * 2 * 4 + weights * 4 * 3
    assert cost.flops == weights * 25
    assert (cost.weight_sparsity, cost.activation_sparsity, cost.flops_reduction) == (0.75, 0.0, 0.75)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", ["residual", "grouped", "shared layer", "padded", "conv1d"])
def test_the_saved_maps_are_the_plans_to_the_byte(name: str) -> None:
    model, x = network(name)
    tuner = trady.prepare(model, x, budget=EVERYTHING, policy=Neurons(0.3))
    for epoch in range(2):
        tuner.resample(epoch)
        ledger = tuner.ledger(lambda: model(x).square().sum().backward())
        cost = tuner.cost()
        assert ledger.saved_bytes_of("channels") == cost.saved_channel_bytes > 0
        compact = [p for n, p in tuner.named_parameters() if n.endswith(".channels")]
        assert sum(p.nbytes for p in compact) == cost.compact_bytes
        assert sum(p.grad.nbytes for p in compact if p.grad is not None) == cost.compact_bytes
        model.zero_grad()
        for parameter in compact:
            parameter.grad = None
    tuner.finish()


PLANNED: dict[str, Any] = {
    "ViT": (VisionTransformer, normal(5, 3, 32, 32)),
    "BERT": (bert, {"input_ids": tokens(8, 24)}),
    "residual": (IMAGE_NETWORKS["residual"][0], normal(64, 3, 33, 33)),
}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", PLANNED)
def test_the_peak_is_what_the_plan_says(name: str, optimizer: str) -> None:
    build, batch = PLANNED[name]
    model = seeded(build)
    full = trady.plan(model, batch, budget="peak:1 GiB", policy="full", recompute="none").predicted_peak_bytes
    assert full is not None
    budget = int(0.75 * full)
    tuner = trady.prepare(model, batch, budget=f"peak:{budget} B", policy=Neurons(0.5))
    made = tuner.attach(getattr(torch.optim, optimizer)(tuner.parameters(), lr=1e-3, foreach=False))
    predicted = tuner.plan.predicted_peak_bytes
    assert predicted is not None
    assert tuner.selection.outputs

    def step() -> None:
        loss_of(batch)(model).backward()
        made.step()
        made.zero_grad()

    step()
    step()
    found = tuner.ledger(step, inference=False).peak_bytes
    assert abs(predicted / found - 1) < 0.005
    assert found <= budget
    tuner.finish()


def test_the_peak_of_a_drawn_selection_is_below_what_the_budget_is_held_against() -> None:
    build, batch = PLANNED["ViT"]
    model = seeded(build)
    plan = trady.plan(model, batch, budget=EVERYTHING, policy=Neurons())
    simulator = Simulator(model, batch, analyse_model(model, batch))
    bound = simulator.timeline(layers=plan.table.names).predicted_peak
    for share in (0.05, 0.3, 0.8):
        draw = Draw(plan.table, plan.table.names, dict.fromkeys(plan.table.names, 1), None, 0, 0)
        selection = Neurons(share).select(draw)
        found = sum(simulator.timeline(selection=selection, parts=True).parts.values())
        assert found <= bound(selection) <= 1.05 * found


# -- optimizers, checkpoints, deltas -----------------------------------------------------------------


def of_outputs(*outputs: int) -> Callable[[ChannelTable], Selection]:
    return lambda table: by_output(table, {"0": list(outputs)})


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))


def trained(tuner: trady.Tuner, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 0) -> None:
    for step in range(steps):
        tuner.model(normal(4, 5, seed=seed + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_neuron_that_stays_keeps_its_momentum_and_one_that_joins_has_none() -> None:
    model = seeded(perceptron)
    policy = Fixed(of_outputs(0, 2, 5), of_outputs(1, 2, 5), lambda table: picked({"0": [1, 3]}), of_outputs(5))
    tuner = trady.prepare(model, normal(4, 5), budget=EVERYTHING, policy=policy)
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    compact = dict(tuner.named_parameters())["0.weight.channels"]
    trained(tuner, optimizer)
    first, second = (optimizer.state[compact][name].clone() for name in ("exp_avg", "exp_avg_sq"))
    assert first.shape == (5, 3) == compact.shape
    tuner.resample(1)
    moved = optimizer.state[compact]["exp_avg"]
    assert torch.equal(moved, torch.stack([torch.zeros(5), first[:, 1], first[:, 2]], 1))
    squares = optimizer.state[compact]["exp_avg_sq"]
    assert torch.equal(squares[:, 1:], second[:, 1:])
    assert torch.allclose(squares[:, 0], second[:, 1:].mean(1))
    tuner.resample(2)  # inputs 1 and 3, of all neurons
    moved = optimizer.state[compact]["exp_avg"]
    assert moved.shape == (2, 6) == compact.shape
    expected = torch.zeros(2, 6)
    expected[:, 2], expected[:, 5] = first[[1, 3], 1], first[[1, 3], 2]
    assert torch.equal(moved, expected)
    tuner.resample(3)
    assert optimizer.state[compact]["exp_avg"].shape == (5, 1)
    trained(tuner, optimizer)
    tuner.finish()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "Rprop", "RMSprop", "Adagrad", "Adamax"])
def test_every_optimizer_trains_on_as_neurons_come_and_go(name: str) -> None:
    model, x = seeded(IMAGE_NETWORKS["conv1d"][0]), normal(3, *IMAGE_NETWORKS["conv1d"][1])
    layers = {layer.name: layer.outputs for layer in trady.plan(model, x, policy="full").table}
    draws = (1, 2, 5, 1, None, 3)
    policy = Fixed(
        *(
            lambda table, n=n: by_output(table, {k: np.arange(min(n or v, v))[-2:] for k, v in layers.items()})
            for n in draws
        )
    )
    tuner = trady.prepare(model, x, budget=EVERYTHING, policy=policy)
    optimizer = tuner.attach(getattr(torch.optim, name)(tuner.parameters(), lr=1e-3))
    for epoch in range(2 * len(draws)):
        tuner.resample(epoch)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter in tuner.parameters():
            assert bool(torch.isfinite(parameter).all())
    tuner.finish()


@pytest.mark.parametrize("updates_in_backward", [False, True])
def test_a_resumed_run_ends_bit_for_bit_where_the_unbroken_one_does(updates_in_backward: bool) -> None:
    kind = trady.optim.AdamW if updates_in_backward else torch.optim.AdamW

    def begun() -> tuple[trady.Tuner, Any]:
        tuner = trady.prepare(seeded(perceptron), normal(4, 5), budget=EVERYTHING, policy=Neurons(0.5), seed=3)
        return tuner, kind(tuner.parameters(), lr=0.01)

    tuner, optimizer = begun()
    tuner.attach(optimizer)
    trained(tuner, optimizer, 2)
    tuner.resample(1)
    trained(tuner, optimizer, 2, seed=5)
    state = copy.deepcopy((tuner.state_dict(), optimizer.state_dict()))
    json.dumps(state[0]["meta"])
    tuner.resample(2)
    trained(tuner, optimizer, 2, seed=9)
    expected = tuner.finish()

    tuner, optimizer = begun()
    tuner.load_state_dict(state[0])
    tuner.attach(optimizer)
    optimizer.load_state_dict(state[1])
    tuner.resample(2)
    trained(tuner, optimizer, 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(tuner.finish().parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("name", ["residual", "grouped", "tokens"])
def test_the_delta_holds_the_neurons_that_trained_and_gives_the_tuned_model_back(name: str) -> None:
    model, x = network(name)
    base = copy.deepcopy(model)
    tuner = trady.prepare(model, x, budget=EVERYTHING, policy=Neurons(0.2))
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=1e-3))
    touched = Selection()
    for epoch in range(2):
        touched |= tuner.resample(epoch)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta, table = tuner.delta(), tuner.plan.table
    values = sum(t.numel() for n, t in delta.items() if n.endswith("::values"))
    assert values == table.weight_elements(touched) < sum(layer.channels * layer.weight_elements for layer in table)
    tuner.finish()
    trady.apply_delta(base, delta)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))


def test_a_delta_with_outputs_that_are_not_there_is_refused_and_changes_nothing() -> None:
    model = seeded(perceptron)
    tuner = trady.prepare(model, normal(4, 5), budget=EVERYTHING, policy=Fixed(of_outputs(1, 4)))
    delta = tuner.delta()
    tuner.finish()
    assert delta["0.weight::outputs"].tolist() == [1, 4]
    before = snapshot(model)
    for wrong in (torch.tensor([1, 6]), torch.tensor([-1, 2]), torch.tensor([1]), torch.tensor([0.0, 1.0])):
        with pytest.raises(CheckpointError):
            trady.apply_delta(model, {**delta, "0.weight::outputs": wrong})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_with_outputs_that_are_not_there_is_refused() -> None:
    tuner = trady.prepare(seeded(perceptron), normal(4, 5), budget=EVERYTHING, policy=Fixed(of_outputs(1)))
    state = copy.deepcopy(tuner.state_dict())
    state["meta"]["selection"]["0"]["outputs"] = [6]
    with pytest.raises(CheckpointError, match="output channel 6 of layer '0'"):
        tuner.load_state_dict(state)
    tuner.finish()


def test_neurons_are_clipped_one_by_one() -> None:
    parameter = nn.Parameter(normal(4, 3, 2, 2))
    gradient = 100 * normal(4, 3, 2, 2, seed=1)
    gradient[:, 2] = 1e-6
    parameter.grad = gradient.clone()
    clip_by_output(parameter, True)
    clip_channels_([parameter], 0.1)
    for column in (0, 1):
        limit = 0.1 * parameter[:, column].norm()
        assert (
            relative_error(parameter.grad[:, column], gradient[:, column] * (limit / gradient[:, column].norm())) < 1e-6
        )
    assert torch.equal(parameter.grad[:, 2], gradient[:, 2])


# -- filling a budget --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_neurons_fill_the_budget_and_the_first_of_a_layer_pays_for_its_input(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers = []
    for i in range(5):
        inputs, outputs, activation = (int(n) for n in random.integers(1, 9, 3))
        groups = inputs if i == 3 else 1
        outputs = inputs if i == 3 else outputs
        shape = (outputs, inputs // groups, 3)
        layers.append(
            Layer(
                f"l{i}", f"l{i}.weight", "conv1d", inputs, outputs // groups * 3, activation, 1, shape, (), (), groups
            )
        )
    table = ChannelTable(tuple(layers))
    capacity = int(random.integers(0, 400))
    prices = {layer.name: 2 * layer.weight_elements + 5 * layer.activation_elements for layer in layers}
    draw = Draw(table, table.names, prices, capacity, seed, 0, weight_price=2)
    counts = [unit_count(layer) for layer in layers]
    order = random.permutation(sum(counts))
    found = fill_output_channels(draw, layers, order)

    left = capacity
    units: list[list[int]] = [[] for _ in layers]
    owner = np.repeat(np.arange(5), counts)
    for position in order:
        layer = int(owner[position])
        opening, price = costs(draw, layers[layer])
        cost = price if units[layer] else opening + price
        if cost <= left:
            left -= cost
            units[layer].append(int(position) - sum(counts[:layer]))
    assert found == unit_selection(draw, layers, [np.array(sorted(u), dtype=np.int64) for u in units])
    assert draw.total(found) == capacity - left
    assert (len(found) > 0) == (min(draw.total(selection) for selection in one_of_each(draw)) <= capacity)
