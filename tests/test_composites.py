"""Linear layers in other words train like others: attention of PyTorch, products with a weight, beside experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trady
from tests.against_dense import assert_dense_gradients, dense_gradients, gradients
from tests.models import normal, seeded
from tests.tight_budget import peaks_in_a_tight_budget, predicted_peak
from trady.calls.canonical import canonical

WIDTH: dict[str, Any] = {"d_model": 16, "nhead": 4, "dim_feedforward": 32}


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` behind an embedding of features, with padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(**WIDTH, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding))


class Translator(nn.Module):
    """``nn.Transformer``: the decoder's queries and keys come from different tokens."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, Any] = {"num_encoder_layers": 1, "num_decoder_layers": 1}
        self.transformer = nn.Transformer(**WIDTH, **layers, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


class Weights(nn.Module):
    """Attention whose weights are handed out, as pooling by attention reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x)
        return self.head(y * weights.mean((1, 2))[:, None, None])


def _padded() -> Tensor:
    return torch.arange(7).expand(4, 7) >= torch.tensor([7, 5, 4, 6])[:, None]


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "encoder": (lambda: Encoder(dropout=0.0, batch_first=True), (normal(4, 7, 6, dtype=torch.float64), _padded())),
    "encoder, sequence first": (lambda: Encoder(dropout=0.0), (normal(7, 4, 6, dtype=torch.float64), _padded())),
    "norm first, GELU": (
        lambda: Encoder(dropout=0.0, batch_first=True, norm_first=True, activation="gelu", bias=False),
        (normal(4, 7, 6, dtype=torch.float64),),
    ),
    "translator": (Translator, (normal(4, 7, 16, dtype=torch.float64), normal(4, 5, 16, seed=1, dtype=torch.float64))),
    "weights handed out": (Weights, (normal(4, 7, 16, dtype=torch.float64),)),
}


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_attention_of_pytorch_trains_by_channel(name: str, train: bool, recompute: str) -> None:
    build, batch = CASES[name]
    model = seeded(build).double().train(train)

    def loss(model: nn.Module) -> Tensor:
        return model(*batch).square().sum()

    tuner = trady.prepare(model, batch, policy="full", recompute=recompute)
    model.train(train)
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert attentions
    assert {f"{name}.out_proj" for name in attentions} <= set(tuner.plan.table.names)
    assert any(layer.parameter.endswith("in_proj_weight") for layer in tuner.plan.table)
    assert_dense_gradients(model, tuner, loss)
    tuner.finish()


def test_dropout_inside_of_attention_draws_what_pytorch_draws() -> None:
    model, x = seeded(lambda: Encoder(dropout=0.2, batch_first=True)).train(), normal(4, 7, 6)
    dense = copy.deepcopy(model)
    tuner = trady.prepare(model, x, policy="full", recompute="all")
    model.train()
    outputs = []
    for network in (dense, model):
        torch.manual_seed(3)
        outputs.append(network(x))
    torch.testing.assert_close(*outputs)
    outputs[1].square().sum().backward()
    tuner.finish()


def test_a_budget_holds_for_attention_of_pytorch() -> None:
    model, x = seeded(lambda: Encoder(batch_first=True)), normal(16, 40, 6)
    whole = trady.measure(lambda: copy.deepcopy(model)(x).square().sum().backward(), inference=False).peak_bytes
    budget = int(0.6 * whole)
    tuner = trady.prepare(model, x, budget=f"peak:{budget} B", policy="dynamic-random")
    assert tuner.plan.recomputed
    found = tuner.ledger(lambda: model(x).square().sum().backward(), inference=False).peak_bytes
    assert found <= budget
    assert abs(predicted_peak(tuner.plan) / found - 1) < 0.03
    tuner.finish()


class ByKeyword(nn.Module):
    """Attention that is called with keywords alone, as diffusers does."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query=query, key=key, value=value)
        return self.head(torch.tanh(self.out(input=y.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_attention_may_be_called_by_keyword(recompute: str) -> None:
    model, x = seeded(ByKeyword).double(), normal(4, 32, 8, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        return torch.log_softmax(model(x), -1).mean()

    tuner = trady.prepare(model, x, budget="peak:1 MB", policy="full", recompute=recompute)
    assert_dense_gradients(model, tuner, loss)
    for parameter in tuner.parameters():
        parameter.grad = None
    measured = tuner.ledger(lambda: loss(model).backward(), inference=False).peak_bytes
    assert abs(predicted_peak(tuner.plan) / measured - 1) < 0.01
    tuner.finish()


# -- products with a weight --------------------------------------------------------------------------------------------


class Products(nn.Module):
    """Linear layers as ``x @ weight`` and its like; ``turned`` is used in a way that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        shapes = (8, 12), (8, 12), (8, 8), (8, 8), (8, 6)
        self.wide, self.narrow, self.square, self.turned, self.rows = (nn.Parameter(torch.randn(s) / 3) for s in shapes)
        self.columns = nn.Parameter(torch.randn(8, 6) / 3)
        self.plain, self.added, self.bias = (nn.Parameter(torch.randn(n) / 3) for n in ((8, 8), (8, 8), (8,)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + torch.relu(x @ self.wide) @ self.narrow.T
        y = torch.matmul(x, self.square.transpose(-1, -2))
        y += F.linear(torch.tanh(x), self.plain.t())
        rows = torch.addmm(self.bias, y.flatten(0, 1), self.added.mT)
        rows = torch.einsum("...i, oi -> ...o", torch.einsum("ni,io->no", torch.tanh(rows), self.rows), self.columns)
        x = torch.tanh(rows.mm(self.turned.T.contiguous()).view_as(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_products_with_a_weight_are_linear_layers(recompute: str) -> None:
    model, ids = seeded(Products).double(), torch.arange(4, 18).view(2, 7)

    def loss(model: nn.Module) -> Tensor:
        return model(ids).square().sum()

    tuner = trady.prepare(model, ids, policy="full", recompute=recompute)
    assert [layer.name for layer in tuner.plan.table] == [
        "wide",
        "narrow",
        "square",
        "plain",
        "added",
        "rows",
        "columns",
    ]
    assert [layer.channels for layer in tuner.plan.table] == [8, 12, 8, 8, 8, 8, 6]
    assert {f.parameter: f.reason for f in tuner.plan.table.frozen}["turned"].startswith("used by contiguous")
    assert_dense_gradients(model, tuner, loss)
    tuner.finish()


@pytest.mark.parametrize("equation", ["ij,jk->ki", "ij,kj->i", "ij,ij->ij", "ii,ij->ij", "ij,jk"])
def test_other_sums_are_no_linear_layers(equation: str) -> None:
    weight = nn.Parameter(torch.randn(5, 5))
    assert canonical(torch.functional.einsum, (equation, torch.randn(5, 5), weight), {})[0] is torch.functional.einsum


def test_a_head_may_be_a_product_with_a_weight() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scores = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.body(x)) @ self.scores.T

    model, x = seeded(Scores), normal(4, 6)
    dense = copy.deepcopy(model)
    tuner = trady.prepare(model, x, policy="full")
    assert tuner.plan.head == ("scores",)
    for network in (dense, model):
        network(x).square().sum().backward()
    torch.testing.assert_close(model.scores.grad, dense.scores.grad)
    tuner.finish()


class Blocks(nn.Module):
    """What a linear layer makes is written to, and sizes are computed as tensors, as Falcon and Longformer do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for inner, outer in zip(self.layers[::2], self.layers[1::2], strict=True):
            pairs: Any = torch.div(x.shape[1], 2, rounding_mode="trunc")
            y = outer(torch.tanh(inner(x)).view(x.shape[0], pairs, 2, 8)).reshape(shape=x.shape)
            y += x
            x = torch.tanh(y)
        return self.head(x.mean(1))


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_results_that_are_written_to_and_sizes_that_are_tensors(recompute: str) -> None:
    model, ids = seeded(Blocks).double(), torch.arange(4, 20).view(2, 8)

    def loss(model: nn.Module) -> Tensor:
        return model(ids).square().sum()

    tuner = trady.prepare(model, ids, policy="full", recompute=recompute)
    assert bool(tuner.plan.recomputed) == (recompute == "all")
    assert_dense_gradients(model, tuner, loss)
    tuner.finish()


class Interleaved(nn.Module):
    """Every block writes what it computes into a tensor of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for inner, outer in zip(self.layers[::2], self.layers[1::2], strict=True):
            made = torch.zeros(x.shape[0], 2 * x.shape[1], x.shape[2], dtype=x.dtype, device=x.device)
            made[:, ::2] = torch.tanh(inner(x))
            made[:, 1::2].copy_(F.gelu(x))
            x = torch.tanh(outer(made)) + made
        return self.head(x.mean(1))


def test_what_is_written_into_a_tensor_that_the_model_makes_is_predicted() -> None:
    model, x = seeded(Interleaved).double(), normal(4, 6, 4, dtype=torch.float64)

    for share in (1.05, 1.3):
        limit, measured, predicted = peaks_in_a_tight_budget(
            model, x, lambda scores: torch.log_softmax(scores, -1).mean(), share=share
        )
        assert measured <= limit
        assert abs(predicted / measured - 1) < 0.01


# -- mixtures of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_what_surrounds_experts_trains_by_channel(recompute: str) -> None:
    """The experts' own weights are no layers of two dimensions: they stay as they are."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.MixtralConfig(**sizes, intermediate_size=32, num_local_experts=4, vocab_size=50, pad_token_id=0)
    model, ids = seeded(lambda: hf.MixtralForCausalLM(config)), torch.arange(3, 45).view(3, 14)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}

    def loss(model: nn.Module) -> Tensor:
        return model(**batch).loss

    tuner = trady.prepare(model, batch, policy="full", recompute=recompute)
    names = tuner.plan.table.names
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "lm_head"} <= set(names)
    assert not any("experts" in name for name in names)
    expected = dense_gradients(model, tuner, loss)
    loss(model).backward()
    for parameter, gradient in gradients(tuner).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-7)
    tuner.finish()


def test_a_budget_holds_for_a_mixture_of_experts() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.MixtralConfig(**sizes, intermediate_size=64, num_local_experts=4, vocab_size=50, pad_token_id=0)
    model, ids = seeded(lambda: hf.MixtralForCausalLM(config)), torch.arange(3, 45).repeat(4, 4)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    whole = trady.measure(lambda: copy.deepcopy(model)(**batch).loss.backward(), inference=False).peak_bytes
    budget = int(0.7 * whole)
    tuner = trady.prepare(model, batch, budget=f"peak:{budget} B", policy="dynamic-random")
    found = tuner.ledger(lambda: model(**batch).loss.backward(), inference=False).peak_bytes
    assert found <= budget
    assert abs(predicted_peak(tuner.plan) / found - 1) < 0.03
    tuner.finish()
