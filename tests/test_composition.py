"""trady together with checkpointing, autocast, quantised weights and PEFT (docs/composition.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trady
from tests.against_dense import armed, dense_gradients, gradients
from tests.models import channels_of, normal, relative_error, same, seeded, snapshot
from tests.neurons import picked
from trady.analysis.model_analysis import analyse_model, find_recomputable
from trady.channels.selection import Selection
from trady.errors import ModelError
from trady.interception.armed import Armed

hf = pytest.importorskip("transformers")

pytestmark = [
    # peft asks transformers for names that transformers has deprecated.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    # Quantisers look at parts of PyTorch that PyTorch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

IDS = torch.randint(1, 50, (4, 12), generator=torch.Generator().manual_seed(0))
PIXELS = normal(4, 3, 16, 16)


def bert(width: int = 32, layers: int = 3) -> Any:
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    return seeded(lambda: hf.BertForSequenceClassification(config)).train()


def llama() -> Any:
    config = hf.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
        use_cache=False,
    )
    return seeded(lambda: hf.LlamaForCausalLM(config)).train()


def vit() -> Any:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return seeded(lambda: hf.ViTForImageClassification(config)).train()


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": IDS}),
    "llama": (llama, {"input_ids": IDS, "labels": IDS}),
    "vit": (vit, {"pixel_values": PIXELS}),
}


def loss_on(batch: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        torch.manual_seed(7)
        output = model(**batch)
        return output.logits.square().sum() if output.get("loss") is None else output.loss

    return loss


def doubled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def assert_gradients(tuner: trady.Tuner, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < tolerance, name


# -- gradient checkpointing --------------------------------------------------------------------------------------


def switch_on(model: nn.Module, reentrant: bool) -> None:
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}})


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_the_checkpointing_of_transformers_has_the_dense_gradients(name: str, reentrant: bool, before: bool) -> None:
    build, batch = MODELS[name][0], doubled(MODELS[name][1])
    model, plain = build().double(), build().double()
    if before:
        switch_on(model, reentrant)
    tuner = armed(model, batch)
    if not before:
        switch_on(model, reentrant)
    expected = dense_gradients(plain, tuner, loss_on(batch))
    loss_on(batch)(model).backward()
    assert_gradients(tuner, expected)
    tuner.finish()


def test_checkpointing_switched_off_again_after_prepare_has_the_dense_gradients() -> None:
    model, batch = vit().double(), doubled({"pixel_values": PIXELS})
    switch_on(model, False)
    tuner = armed(model, batch)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            vars(module)["gradient_checkpointing"] = False
    expected = dense_gradients(vit().double(), tuner, loss_on(batch))
    loss_on(batch)(model).backward()
    assert_gradients(tuner, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_and_trady_together_take_less_than_either(reentrant: bool) -> None:
    batch = {"input_ids": IDS}

    def peak(checkpointed: bool, channels: bool) -> int:
        model = bert(64, 4)
        if checkpointed:
            switch_on(model, reentrant)
        if not channels:
            ledger = trady.measure(lambda: loss_on(batch)(model).backward(), model)
        else:
            tuner = trady.prepare(model, batch, budget="elements:20000", policy="dynamic-random")
            ledger = tuner.ledger(lambda: loss_on(batch)(model).backward())
        return ledger.peak_without_weights_bytes

    together = peak(True, True)
    assert together < peak(False, True)
    assert together < peak(True, False)


def test_a_reentrant_checkpoint_needs_inputs_that_require_gradients() -> None:
    """PyTorch warns, and the switch of transformers that its warning calls for is enough."""
    model, batch = vit(), {"pixel_values": PIXELS}
    switch_on(model, True)
    tuner = trady.prepare(model, batch, budget="elements:3000", policy="dynamic-random")
    name = next(layer.name for layer in tuner.plan.table if layer.name.startswith("vit.layers.0"))
    tuner._draws.apply(picked({name: [1, 2]}))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        loss_on(batch)(model).backward()
    tuner.finish()
    model.enable_input_require_grads()
    tuner = trady.prepare(model, batch, budget="elements:3000", policy="dynamic-random")
    tuner._draws.apply(picked({name: [1, 2]}))
    loss_on(batch)(model).backward()
    assert f"{name}.weight.channels" in gradients(tuner)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_segments_that_trady_recomputes_give_way_to_checkpoints_switched_on_later(reentrant: bool) -> None:
    model, batch = vit().double(), doubled({"pixel_values": PIXELS})
    analysis = analyse_model(model, batch)
    found = find_recomputable(model, batch, analysis)
    segments = found[0] if isinstance(found, tuple) else found
    assert segments.training
    prepared = Armed(model, analysis, segments)
    prepared.select(Selection({layer.name: np.arange(layer.channels) for layer in analysis.table}))
    switch_on(model, reentrant)
    loss_on(batch)(model).backward()
    dense = vit().double()
    loss_on(batch)(dense).backward()
    for layer in analysis.table:
        expected = dense.get_parameter(layer.parameter).grad
        gradient = prepared.layers[layer.name].compact.grad
        assert relative_error(gradient, channels_of(expected, layer, np.arange(layer.channels))) < 1e-10, layer.name
    prepared.disarm()


class Switched(nn.Module):
    """A checkpoint of its own, that begins with what trady would compute in place."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.mine = False

    def inner(self, x: Tensor) -> Tensor:
        return self.conv(F.leaky_relu(x, 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = checkpoint(self.inner, x, use_reentrant=False) if self.mine else self.inner(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("norm", [True, False], ids=["fused", "not fused"])
def test_a_checkpoint_that_appears_after_prepare_is_refused_unless_the_model_is_prepared_anew(norm: bool) -> None:
    x = normal(2, 3, 9, 9, dtype=torch.float64)
    model = seeded(lambda: Switched(norm)).double()

    def loss(net: nn.Module) -> Tensor:
        return net(x).square().sum()

    tuner = armed(model, x)
    expected = dense_gradients(model, tuner, loss)
    model.mine = True
    with pytest.raises(ModelError, match=r"switch it on first, then call trady\.prepare"):
        loss(model)
    tuner.finish()
    tuner = armed(model, x)
    loss(model).backward()
    assert_gradients(tuner, expected)


# -- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_transformers_under_bfloat16_autocast_are_as_near_to_float32_as_pytorch(name: str) -> None:
    build, batch = MODELS[name]
    model, plain = build().eval(), build().eval()

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_on(batch)(net).float()

    tuner = armed(model, batch)
    exact = dense_gradients(plain, tuner, loss_on(batch))
    theirs = dense_gradients(plain, tuner, loss)
    loss(model).backward()
    found = gradients(tuner)
    assert found.keys() == exact.keys()
    for layer, gradient in exact.items():
        assert found[layer].dtype == torch.float32
        own = relative_error(theirs[layer], gradient)
        assert relative_error(found[layer], gradient) <= max(1.5 * own, 2e-2), (layer, own)
    tuner.finish()


# -- PEFT --------------------------------------------------------------------------------------------------------


def with_lora(build: Callable[[], nn.Module] = bert) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["query", "value", "q_proj", "v_proj"])
    torch.manual_seed(0)
    model = peft.get_peft_model(build(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero as peft makes them: A would have no gradient
    return model.double().train()


def adapters_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_base_trains_by_channel_beside_adapters_that_train_whole(name: str, tmp_path: Path) -> None:
    build, batch = MODELS[name]
    model, plain = with_lora(build), with_lora(build)
    flags = [p.requires_grad for p in model.parameters()]
    tuner = armed(model, batch, head=adapters_of(model), train="*")  # peft has frozen the base
    base = [layer.name for layer in tuner.plan.table if layer.name.endswith("base_layer")]
    assert len(base) == 2 * (3 if name == "bert" else 2)
    expected = dense_gradients(plain, tuner, loss_on(batch))
    loss_on(batch)(model).backward()
    assert_gradients(tuner, expected)
    assert {n for n in expected if "lora_" in n} == set(adapters_of(model))

    before = snapshot(model)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    optimizer.step()
    tuner.finish()
    assert [p.requires_grad for p in model.parameters()] == flags
    after = snapshot(model)
    assert not torch.equal(after[f"{base[0]}.weight"], before[f"{base[0]}.weight"])
    trained = model.eval()(**batch).logits.detach()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    merged = model.merge_and_unload()
    assert relative_error(merged(**batch).logits, trained) < 1e-10


def test_a_merged_model_is_a_model_like_any_other() -> None:
    model = with_lora().merge_and_unload().train()
    batch = {"input_ids": IDS}
    with pytest.raises(ModelError, match="every layer of this BertForSequenceClassification is frozen by hand"):
        armed(model, batch)  # so peft leaves it
    model.requires_grad_(True)
    tuner = armed(model, batch)
    expected = dense_gradients(with_lora().merge_and_unload().train(), tuner, loss_on(batch))
    loss_on(batch)(model).backward()
    assert_gradients(tuner, expected)
    assert tuner.plan.head == ("classifier",)


def test_a_delta_holds_the_base_channels_that_the_adapter_file_does_not() -> None:
    model = with_lora()
    fresh = copy.deepcopy(model)
    tuner = armed(model, {"input_ids": IDS}, head=adapters_of(model), train="*")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.05))
    loss_on({"input_ids": IDS})(model).backward()
    optimizer.step()
    delta = tuner.delta()
    tuner.finish()
    assert same(snapshot(trady.apply_delta(fresh, delta)), snapshot(model))


# -- a batch of another kind -------------------------------------------------------------------------------------


def test_a_forward_pass_that_ends_inside_a_segment_is_an_error_and_no_memory_that_nobody_has_written_to() -> None:
    model = llama().eval()
    tuner = trady.prepare(model, {"input_ids": IDS, "labels": IDS}, budget="elements:5000", policy="dynamic-random")
    with pytest.raises(ModelError, match=r"it ended where \w+ was expected.*prepare with an example of that kind"):
        model(input_ids=IDS)
    expected = model(input_ids=IDS, labels=IDS).logits
    assert torch.equal(tuner.finish()(input_ids=IDS).logits, expected)
