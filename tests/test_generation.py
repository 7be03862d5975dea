"""A prepared model is used between two steps: generation, prediction without labels, an encoder on its own."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trady
from tests.models import seeded

hf = importlib.import_module("transformers")

VOCABULARY = 60
COMMON = {"vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
T5 = {"dropout_rate": 0.0, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
BART = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0} | {
    f"{part}_{what}": value
    for part in ("encoder", "decoder")
    for what, value in (("layers", 2), ("ffn_dim", 32), ("attention_heads", 2))
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, bos_token_id=1, **COMMON)
    ),
    "Llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, **COMMON)
    ),
    "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(num_layers=2, **T5, **COMMON)),
    "BART": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(d_model=16, max_position_embeddings=32, decoder_start_token_id=1, bos_token_id=1,
                      forced_eos_token_id=None, **BART, **COMMON)
    ),
}  # fmt: skip

IDS = torch.randint(2, VOCABULARY - 1, (3, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model twice, without dropout."""
    model = seeded(MODELS[request.param])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("recompute", ["none", "all", "auto"])
def test_an_armed_model_generates_what_the_plain_one_does_and_trains_on(pair: tuple[Any, Any], recompute: str) -> None:
    model, plain = pair
    tuner = trady.prepare(model, BATCH, budget="elements:4000", recompute=recompute, ranking="structural")
    for training in (False, True):
        for one in (model, plain):
            one.train(training)
        for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True}):
            with torch.no_grad():
                torch.manual_seed(3)
                found = model.generate(IDS, max_new_tokens=5, **options)
                torch.manual_seed(3)
                expected = plain.generate(IDS, max_new_tokens=5, **options)
            assert torch.equal(found, expected), options
    model(**BATCH).loss.backward()
    plain(**BATCH).loss.backward()
    gradients = dict(tuner.named_parameters())
    for name, channels in tuner.selection.items():
        layer = tuner.plan.table[name]
        whole = plain.get_parameter(layer.parameter).grad
        rows = torch.from_numpy(channels.copy())
        wanted = whole[rows] if layer.kind == "addmm" else whole[:, rows].T
        torch.testing.assert_close(gradients[f"{layer.parameter}.channels"].grad, wanted, rtol=1e-3, atol=1e-6)
    tuner.finish()


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_other_calls_without_gradients_are_those_of_the_plain_model(pair: tuple[Any, Any], recompute: str) -> None:
    model, plain = pair
    tuner = trady.prepare(model, BATCH, budget="elements:4000", recompute=recompute, ranking="structural")
    calls: list[Callable[[Any], torch.Tensor]] = [
        lambda m: m(**BATCH).loss,
        lambda m: m(input_ids=IDS[:1], labels=IDS[:1]).loss,
        lambda m: m(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).logits,
        lambda m: m(input_ids=IDS, labels=IDS, output_hidden_states=True).logits,
        lambda m: m.get_encoder()(IDS)[0] if m.config.is_encoder_decoder else m(IDS).logits,
        lambda m: m(**BATCH).loss,
    ]
    for call in calls:
        with torch.no_grad():
            torch.testing.assert_close(call(model.eval()), call(plain.eval()), rtol=1e-4, atol=1e-5)
    model.train()(**BATCH).loss.backward()
    tuner.finish()
