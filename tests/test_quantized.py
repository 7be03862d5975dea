"""Layers whose weights are stored quantised train by channel, as the dense model would (docs/composition.md)."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.against_dense import armed, dense_gradients, gradients
from tests.models import gradient_of, normal, relative_error, same, seeded, snapshot
from tests.quantised_network import (
    KINDS,
    OPTIMIZERS,
    WIDTH,
    X,
    Y,
    assert_gradients,
    dequantised,
    loss,
    network,
    quantised,
    quantised_layers,
    train,
)
from tests.small_task import StopAfter
from trady.channels.selection import Selection
from trady.channels.table import by_output
from trady.errors import CheckpointError, ModelError, TradyWarning
from trady.policies import Draw
from trady.quantized.formats import stored_in
from trady.training.run import finetune
from trady.training.run_folder import RunFolder

pytestmark = [
    # Quantisers look at parts of PyTorch that PyTorch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


# -- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_selected_channels_have_the_gradients_of_the_dense_model(kind: str, recompute: str) -> None:
    model = quantised(kind, network())
    dense = dequantised(model)
    tuner = trady.prepare(model, X, budget="elements:4000", policy="dynamic-random", recompute=recompute)
    assert len(quantised_layers(tuner)) == 6
    assert relative_error(model(X), dense(X)) < 1e-5
    expected = dense_gradients(dense, tuner, loss())
    assert any(name.startswith("blocks") for name in expected)
    loss()(model).backward()
    assert_gradients(tuner, expected, 1e-5)


@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-4"])
def test_bfloat16_weights_give_gradients_as_near_as_pytorchs_own(kind: str) -> None:
    model = quantised(kind, network().bfloat16())
    dense, x = dequantised(model), X.bfloat16()
    tuner = armed(model, x)
    exact = dense_gradients(dense.float(), tuner, loss(x.float()))
    own = dense_gradients(dense.bfloat16(), tuner, loss(x))
    loss(x)(model).backward()
    for name, gradient in gradients(tuner).items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient.float(), exact[name]) < 2 * relative_error(own[name].float(), exact[name]) + 1e-3


@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-4"])
def test_gradients_under_autocast_are_as_near_to_float32_as_pytorchs_own(kind: str) -> None:
    model = quantised(kind, network())
    tuner, dense = armed(model, X), dequantised(model)
    exact = dense_gradients(dense, tuner, loss())
    with torch.autocast("cpu", torch.bfloat16):
        own = dense_gradients(dense, tuner, loss())
        loss()(model).backward()
    for name, gradient in gradients(tuner).items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact[name]) < 2 * relative_error(own[name], exact[name]) + 1e-3


@pytest.mark.parametrize("kind", ["bitsandbytes-4"])
def test_a_gradient_checkpoint_has_the_dense_gradients(kind: str) -> None:
    model = quantised(kind, network(checkpoints=True))
    tuner = armed(model, X)
    expected = dense_gradients(dequantised(model), tuner, loss())
    loss()(model).backward()
    assert_gradients(tuner, expected, 1e-5)


@dataclass
class Neurons:
    """Some output channels of every layer."""

    name: str = "neurons-for-a-test"
    uses_ranking: bool = False

    def select(self, draw: Draw) -> Selection:
        return by_output(draw.table, {layer.name: range(draw.epoch, layer.outputs, 7) for layer in draw.table})


@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-4"])
def test_output_channels_can_be_chosen_in_quantised_layers_too(kind: str) -> None:
    model = quantised(kind, network())
    tuner = trady.prepare(model, X, budget="elements:1000000", policy=Neurons())
    dense = dequantised(model).requires_grad_(True)
    loss()(dense).backward()
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    loss()(model).backward()
    found = gradients(tuner)
    for name in quantised_layers(tuner):
        whole = gradient_of(dense.get_parameter(f"{name}.weight"))
        chosen = torch.from_numpy(tuner.selection.outputs[name].copy())
        assert relative_error(found[f"{name}.weight.channels"], whole[chosen].t()) < 1e-5
    optimizer.step()
    tuner.resample(1)
    with torch.no_grad():
        for name in quantised_layers(tuner):
            weight = dense.get_parameter(f"{name}.weight")
            rows = torch.arange(0, len(weight), 7)
            weight[rows] -= 0.1 * gradient_of(weight)[rows]
            plain = trady.dequantize(copy.deepcopy(tuner.finish())) if name == quantised_layers(tuner)[-1] else None
    assert plain is not None
    for name in [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]:
        assert relative_error(plain.get_parameter(name), dense.get_parameter(name)) < 1e-5


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-4"])
def test_training_over_several_draws_ends_where_the_dense_model_does(kind: str, name: str) -> None:
    model = quantised(kind, network()).train()
    dense = dequantised(model).train()
    parts = 1 if name == "in backward" else 3
    ended = []
    for net in (model, dense):
        tuner = trady.prepare(net, X, budget="elements:4000", policy="dynamic-random", recompute="none")
        optimizer = tuner.attach(OPTIMIZERS[name](tuner.parameters()))
        train(net, tuner, optimizer, range(3), parts)
        ended.append(trady.dequantize(tuner.finish()))
    left, right, before = (snapshot(net) for net in (*ended, dequantised(quantised(kind, network()))))
    assert left.keys() == right.keys()
    for key in (key for key in left if "blocks" in key and "up.weight" in key):
        changed = right[key] - before[key]
        assert relative_error(left[key] - before[key], changed) < 1e-2
        assert changed.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bit_for_bit_where_the_unbroken_one_does(kind: str) -> None:
    ended = []
    for broken in (False, True):
        model = quantised(kind, network()).train()
        tuner = trady.prepare(model, X, budget="elements:3000", policy="dynamic-random", recompute="none")
        optimizer = tuner.attach(OPTIMIZERS["momentum"](tuner.parameters()))
        train(model, tuner, optimizer, range(2), 1)
        if broken:
            states = copy.deepcopy((tuner.state_dict(), optimizer.state_dict()))
            model = quantised(kind, network()).train()
            tuner = trady.prepare(model, X, budget="elements:3000", policy="dynamic-random", recompute="none")
            optimizer = tuner.attach(OPTIMIZERS["momentum"](tuner.parameters()))
            tuner.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        train(model, tuner, optimizer, range(2, 4), 1)
        ended.append((tuner.delta(), tuner.finish().eval()(X)))
    assert same(ended[0][0], ended[1][0])
    assert torch.equal(ended[0][1], ended[1][1])


# -- what training leaves ----------------------------------------------------------------------------------------


@pytest.fixture(params=["torchao-8", "bitsandbytes-4"])
def trained(request: pytest.FixtureRequest) -> tuple[str, nn.Module, trady.Tuner]:
    model = quantised(request.param, network()).train()
    tuner = trady.prepare(model, X, budget="elements:3000", policy="dynamic-random", recompute="none")
    train(model, tuner, tuner.attach(OPTIMIZERS["momentum"](tuner.parameters())), range(3), 1)
    return request.param, model, tuner


def test_the_finished_model_computes_what_the_armed_one_did(trained: tuple[str, nn.Module, trady.Tuner]) -> None:
    _, model, tuner = trained
    printed, model = str(model), model.eval()
    armed_now = model(X)
    with tuner.untouched():
        assert torch.equal(model(X), armed_now)
    tuner.finish()
    assert torch.equal(model(X), armed_now)
    assert torch.equal(copy.deepcopy(model)(X), armed_now)
    assert str(model) == printed
    assert all(stored_in(m) is not None for name, m in model.named_modules() if name.endswith((".up", ".down")))


def test_float_channels_are_in_the_state_and_a_base_without_them_refuses_it(
    trained: tuple[str, nn.Module, trady.Tuner],
) -> None:
    kind, _, tuner = trained
    drawn = tuner._draws.touched["blocks.0.up"]
    state = tuner.finish().state_dict()
    assert np.array_equal(state["blocks.0.up.float_channels"].numpy(), drawn)
    assert state["blocks.0.up.float_values"].shape == (len(drawn), 2 * WIDTH)
    if kind == "torchao-8":
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*float_channels"):
            quantised(kind, network()).load_state_dict(state)


def test_only_channels_that_have_trained_are_kept_in_floating_point() -> None:
    model = quantised("torchao-8", network())
    tuner = trady.prepare(model, X, budget="elements:3000", policy="dynamic-random", recompute="none")
    tuner.resample(1)
    assert not tuner.delta().keys() - {"head.weight::whole", "head.bias::whole", *_plain(tuner.delta())}
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    tuner.sweeper(F.cross_entropy).mean([(X, Y)], lambda g: g.square().sum(1))
    assert "blocks.0.up.float_channels" not in model.state_dict()
    loss()(model).backward()
    optimizer.step()
    kept = model.state_dict()["blocks.0.up.float_channels"]
    assert np.array_equal(kept.numpy(), tuner.selection["blocks.0.up"])


def _plain(delta: dict[str, Tensor]) -> list[str]:
    return [key for key in delta if not key.startswith("blocks")]


def test_a_delta_makes_the_fine_tuned_model_of_the_quantised_base(
    trained: tuple[str, nn.Module, trady.Tuner],
) -> None:
    kind, _, tuner = trained
    delta = tuner.delta()
    expected = tuner.finish().eval()(X)
    fresh = trady.apply_delta(quantised(kind, network()), delta).eval()
    assert torch.equal(fresh(X), expected)


def test_a_delta_puts_the_trained_channels_into_a_base_in_floating_point(
    trained: tuple[str, nn.Module, trady.Tuner],
) -> None:
    _, _, tuner = trained
    delta = tuner.delta()
    plain = trady.apply_delta(network(), delta)
    channels = delta["blocks.1.down.weight::channels"]
    changed, before = plain.get_parameter("blocks.1.down.weight"), network().get_parameter("blocks.1.down.weight")
    assert torch.equal(changed[:, channels].t(), delta["blocks.1.down.weight::values"])
    others = torch.ones(changed.shape[1], dtype=torch.bool).index_fill_(0, channels, False)
    assert torch.equal(changed[:, others], before[:, others])


def test_dequantising_gives_plain_layers_that_compute_the_same(trained: tuple[str, nn.Module, trady.Tuner]) -> None:
    _, model, tuner = trained
    with pytest.raises(trady.StateError, match="is prepared already"):
        trady.dequantize(model)
    expected = model.eval()(X)
    plain = tuner.finish(dequantize=True)
    assert plain is model
    assert all(type(m) is nn.Linear for name, m in plain.named_modules() if name.endswith((".up", ".down")))
    assert plain.state_dict().keys() == network().state_dict().keys()
    assert relative_error(plain(X), expected) < 1e-5


def test_a_finished_model_can_be_prepared_again_and_trains_on(trained: tuple[str, nn.Module, trady.Tuner]) -> None:
    _, model, tuner = trained
    before = tuner.delta()
    tuner.finish()
    dense = trady.dequantize(copy.deepcopy(model))
    again = armed(model, X)
    expected = dense_gradients(dense, again, loss())
    loss()(model).backward()
    assert_gradients(again, expected, 1e-5)
    optimizer = again.attach(torch.optim.SGD(again.parameters(), lr=0.1))
    optimizer.step()
    assert len(again.delta()["blocks.0.up.weight::channels"]) > len(before["blocks.0.up.weight::channels"])


def test_a_delta_of_a_whole_layer_is_refused_where_that_layer_is_quantised() -> None:
    whole = {"blocks.0.up.weight::whole": torch.zeros(2 * WIDTH, WIDTH)}
    with pytest.raises(CheckpointError, match="stores quantised: apply it to a base in floating point"):
        trady.apply_delta(quantised("torchao-8", network()), whole)


def test_finetune_resumes_and_leaves_the_delta_of_a_quantised_model(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(X, Y)
    options: dict[str, Any] = {"budget": "elements:3000", "policy": "dynamic-random", "batch_size": 4, "epochs": 3}

    def run(name: str, progress: Any = False, **more: Any) -> nn.Module:
        model = quantised("torchao-8", network())
        return finetune(model, data, data, out=tmp_path / name, progress=progress, **{**options, **more}).model

    whole = run("whole").eval()(X)
    with pytest.raises(KeyboardInterrupt):
        run("broken", StopAfter(2))
    assert torch.equal(run("broken", resume=True).eval()(X), whole)
    assert same(_delta_of(tmp_path / "broken"), _delta_of(tmp_path / "whole"))
    fresh = trady.apply_delta(quantised("torchao-8", network()), _delta_of(tmp_path / "whole"))
    assert torch.equal(fresh.eval()(X), whole)
    assert {path.name for path in (tmp_path / "whole").glob("*.safetensors")} == {
        "best-delta.safetensors", "delta.safetensors"
    }  # fmt: skip
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert RunFolder(tmp_path / "whole").best_epoch() == result["best_epoch"]
    best = trady.apply_delta(quantised("torchao-8", network()), _delta_of(tmp_path / "whole", "best-delta"))
    hits = float((best.eval()(X).argmax(-1) == Y).float().mean())
    assert hits == pytest.approx(result["best_accuracy"])
    with pytest.raises(ModelError, match="only channels of it can train"):
        run("full", budget=None, policy="full")


def _delta_of(folder: Path, name: str = "delta") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


# -- what cannot train -------------------------------------------------------------------------------------------


def test_weights_that_hand_no_gradient_back_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(), lambda m, name: name == "1")
    tuner = armed(model, normal(4, 32))
    assert "outside of a linear layer that can be read" in tuner.plan.table.frozen[0].reason
    with pytest.raises(ModelError, match="quantise the weights only"):
        model(normal(4, 32))
    tuner.finish()


def test_a_weight_that_is_not_called_by_its_own_layer_stays_frozen_and_passes_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.stored, self.head = nn.Linear(WIDTH, WIDTH), Held(), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stored(self.first(x)))

    class Held(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias).relu()

    quantization = pytest.importorskip("torchao.quantization")
    model, x = seeded(Tied), X[:, 0]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda m, name: name == "stored")
    dense = seeded(Tied)
    with torch.no_grad():
        dense.stored.weight.copy_(model.stored.weight.dequantize())
    tuner = armed(model, x)
    assert tuner.plan.table.names == ("first",)
    expected = dense_gradients(dense, tuner, loss(x))
    loss(x)(model).backward()
    assert_gradients(tuner, expected, 1e-5)


def test_a_quantised_head_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot train: it is stored quantised, as Int8Tensor"):
        armed(quantised("torchao-8", network()), X, head="blocks.2")


def test_weights_that_bitsandbytes_has_repacked_are_unpacked() -> None:
    modules = pytest.importorskip("bitsandbytes").nn
    if not modules.Linear4bit(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    model = quantised("bitsandbytes-4", network())
    for block in model.blocks:
        block.up.support_avx512bf16_for_cpu = True
    model.eval()
    with torch.no_grad():
        model(X)
    assert model.blocks[0].up.weight.quant_state.packing_format_for_cpu
    with pytest.warns(TradyWarning, match="repacks 4-bit weights"):
        tuner = armed(model, X)
    expected = dense_gradients(dequantised(model), tuner, loss(X))  # repacking has rounded the scales
    loss(X)(model.train()).backward()
    assert_gradients(tuner, expected, 1e-5)
    model.eval()
    with torch.no_grad():
        model(X)
    assert not model.blocks[0].up.support_avx512bf16_for_cpu
