"""Segments that are recomputed: the same gradients, random numbers and losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.against_dense import gradients
from tests.models import gradient_of, normal, relative_error, seeded
from tests.recomputed_models import RECOMPUTED, VisionTransformer, bert, gpt2, loss_of, recomputed_model, swin, tokens
from tests.recomputing import anew, close, four_layers, worst, worst_of_few
from trady.interception.program import Program

pytestmark = pytest.mark.usefixtures("one_sample_a_part")


hf = pytest.importorskip("transformers")


# -- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_gradients_are_the_dense_models(name: str, train: bool, parts: list[int]) -> None:
    model, batch = recomputed_model(name)
    model.train(train)
    tuner = anew(model, batch)
    least = RECOMPUTED[name][2]
    assert len(tuner.plan.recomputed) == tuner.plan.recomputable >= least
    parts.clear()
    assert worst(model, tuner, loss_of(batch)) < close(name)
    assert len(parts) >= 2 * least
    assert set(parts) == {4}, "not by sample"
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "Llama, loss", "Swin", "EfficientNet, by hand", "ViT, by hand"])
def test_gradients_in_float32(name: str) -> None:
    model, batch = recomputed_model(name, torch.float32)
    tuner = anew(model, batch)
    assert worst(model, tuner, loss_of(batch)) < 1e-5
    tuner.finish()


def test_a_tensor_that_is_handed_on_under_two_names_is_one_tensor() -> None:
    """A recurrent state that is asked for in the type that it has comes back as it is."""
    program = Program(())
    state = program.write(torch.exp, (normal(2, 3),), {}, held=[0])
    assert program.write(Tensor.to, (state, torch.float32), {}, held=[0]) is state
    assert len(program.held) == 1


def test_the_scan_of_mamba_has_the_dense_gradients() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4, "time_step_rank": 2}
    config = hf.MambaConfig(**sizes, use_mambapy=False, use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model, batch = seeded(lambda: hf.MambaForCausalLM(config)), {"input_ids": tokens(3, 16), "labels": tokens(3, 16)}
    tuner = anew(model, batch)
    assert tuner.plan.recomputed
    assert worst(model, tuner, loss_of(batch)) < 1e-5
    tuner.finish()


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", ["GPT-2, loss", "ConvNeXt", "BERT"])
def test_gradients_of_a_few_channels(name: str, share: float) -> None:
    model, batch = recomputed_model(name)
    table = trady.plan(model, batch, policy="full").table
    elements = int(share * sum(layer.channels * layer.elements for layer in table))
    tuner = trady.prepare(model, batch, budget=f"elements:{elements}", policy="dynamic-random", recompute="all")
    for epoch in range(2):
        tuner.resample(epoch)
        assert worst(model, tuner, loss_of(batch)) < close(name)
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "ViT, by hand", "EfficientNet, by hand"])
def test_none_and_all_have_the_same_gradients(name: str) -> None:
    model, batch = recomputed_model(name)
    found = []
    for mode in ("none", "all"):
        tuner = anew(model, batch, recompute=mode)
        assert bool(tuner.plan.recomputed) == (mode == "all")
        loss_of(batch)(model).backward()
        found.append(gradients(tuner))
        model.zero_grad()
        tuner.finish()
    assert all(relative_error(found[1][n], g) < 1e-12 for n, g in found[0].items())


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT"])
def test_a_step_of_an_optimizer_is_the_dense_models(name: str) -> None:
    """Weights change between the steps; what stands in for the activations is used again."""
    model, batch = recomputed_model(name)
    dense = copy.deepcopy(model)
    tuner = anew(model, batch)
    trained = {n.removesuffix(".channels") for n, _ in tuner.named_parameters()}
    ours = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    theirs = torch.optim.SGD([p for n, p in dense.named_parameters() if n in trained], lr=0.01)
    for _ in range(3):
        for network, optimizer in ((model, ours), (dense, theirs)):
            optimizer.zero_grad()
            loss_of(batch)(network).backward()
            optimizer.step()
    tuner.finish()
    for name_, parameter in dense.named_parameters():
        assert relative_error(model.get_parameter(name_), parameter) < 1e-10, name_


# -- random numbers ----------------------------------------------------------------------------------------------


def _dropping(name: str) -> tuple[nn.Module, Any]:
    builds: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "BERT": (lambda: bert(dropout=0.3), {"input_ids": tokens(4, 7)}),
        "GPT-2": (lambda: gpt2(dropout=0.3), {"input_ids": tokens(4, 7)}),
        "ViT, by hand": (lambda: VisionTransformer(dropout=0.3), normal(4, 3, 12, 12, dtype=torch.float64)),
        "Swin": (lambda: swin(drop_path_rate=0.5), {"pixel_values": normal(4, 3, 16, 16, dtype=torch.float64)}),
    }
    build, batch = builds[name]
    return seeded(build).double().train(), batch


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ViT, by hand", "Swin"])
def test_dropout_draws_the_same_masks_again(name: str, parts: list[int]) -> None:
    """The gradient is that of the very loss that was computed: along a random direction it is the loss's slope."""
    model, batch = _dropping(name)
    tuner = anew(model, batch)
    compact = [p for n, p in tuner.named_parameters() if n.endswith(".channels")]

    def loss() -> Tensor:
        torch.manual_seed(7)
        return loss_of(batch)(model)

    first = loss()
    first.backward()
    found = gradients(tuner)
    after = torch.get_rng_state()
    for parameter in tuner.parameters():
        parameter.grad = None
    second = loss()
    assert torch.equal(first, second)
    second.backward()
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(gradient, found[n]) for n, gradient in gradients(tuner).items())
    assert {4} == set(parts)

    directions = [normal(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(compact)]
    slope = torch.stack([(gradient_of(p) * d).sum() for p, d in zip(compact, directions, strict=True)]).sum()
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(compact, directions, strict=True):
                p.add_(step * d)
            values.append(loss())
    assert relative_error((values[0] - values[1]) / 2e-6, slope) < 1e-5
    tuner.finish()


def test_a_backward_pass_leaves_the_random_numbers_as_they_were() -> None:
    model, batch = _dropping("BERT")
    tuner = anew(model, batch)
    loss = loss_of(batch)(model)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())
    tuner.finish()


# -- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(7, 7, 7, 7), (1, 7, 0, 2), (0, 0, 5, 0)], ids=str)
@pytest.mark.parametrize("name", ["GPT-2, loss", "Llama, loss"])
def test_the_mean_over_labels_that_are_spread_unevenly(name: str, kept: tuple[int, ...], parts: list[int]) -> None:
    model, batch = recomputed_model(name)
    labels = batch["labels"].clone()
    for row, count in enumerate(kept):
        labels[row, count:] = -100
    tuner = anew(model, batch)
    assert worst(model, tuner, loss_of({**batch, "labels": labels})) < close(name)
    assert set(parts) == {4}
    tuner.finish()


class WithLoss(nn.Module):
    """Its own loss over many classes."""

    weights: Tensor | None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.wide, self.scores = nn.Linear(8, 16), nn.Linear(16, 64), nn.Linear(64, 9)
        self.register_buffer("weights", torch.linspace(0.5, 2, 9) if options.pop("weighted", False) else None)
        self.options = options

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        return F.cross_entropy(self.scores(F.gelu(self.wide(x.tanh()))), y, self.weights, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"weighted": True},
        {"weighted": True, "ignore_index": 200},
        {"label_smoothing": 0.2},
        {"weighted": True, "label_smoothing": 0.2, "ignore_index": 3},
        {"reduction": "sum", "label_smoothing": 0.1, "ignore_index": 0},
    ],
    ids=str,
)
def test_every_kind_of_cross_entropy(options: dict[str, Any], parts: list[int]) -> None:
    model = seeded(lambda: WithLoss(**options)).double()
    y = torch.tensor([1, 3, options.get("ignore_index", 8), 0, 3])
    batch = {"x": normal(5, 8, dtype=torch.float64), "y": y}
    tuner = anew(model, batch, head="first")
    assert worst_of_few(model, tuner, lambda m: m(**batch)) < 1e-10
    assert parts
    assert set(parts) == {5}
    tuner.finish()


def test_a_loss_over_nothing_is_what_pytorch_says() -> None:
    model, batch = recomputed_model("GPT-2, loss")
    tuner = anew(model, batch)
    loss = model(batch["input_ids"], labels=torch.full((4, 7), -100)).loss
    assert torch.isnan(loss)
    tuner.finish()


class LossInside(nn.Module):
    """Scales what it computes by a loss over the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.down, self.head = four_layers()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        h = F.gelu(self.wide(x.tanh()))
        h = h * F.cross_entropy(h, y)
        return self.head(x + self.down(h.sigmoid()))


def test_a_loss_in_the_middle_of_a_segment_keeps_the_batch_together(parts: list[int]) -> None:
    model = seeded(LossInside).double()
    batch = {"x": normal(4, 8, dtype=torch.float64), "y": torch.tensor([1, 3, 8, 0])}
    tuner = anew(model, batch)
    assert worst_of_few(model, tuner, loss_of(batch)) < 1e-10
    assert parts
    assert set(parts) == {1}
    tuner.finish()
