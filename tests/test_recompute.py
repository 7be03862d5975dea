"""SegmentsByMode that are computed anew: the same gradients, in parts where samples do not mix, and nothing kept."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import trady
import trady.interception.deferred_segment
from tests.models import freeze_norms, normal, relative_error, seeded
from tests.recomputed_models import (
    RECOMPUTED,
    TokenBlock,
    VisionTransformer,
    bert,
    call,
    gpt2,
    loss_of,
    padding,
    recomputed_model,
    swin,
    tokens,
)
from tests.test_interception import armed, dense_gradients, gradients
from trady.analysis.model_analysis import find_recomputable
from trady.analysis.sample_axes import samples_of
from trady.analysis.segments import merged
from trady.errors import ModelError
from trady.interception.program import Program
from trady.model.batch import twice
from trady.ops import recompute
from trady.ops.sample_axis import SampleAxis
from trady.trace.recorder import trace_forward

hf = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _one_sample_a_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models would fit into one part."""
    monkeypatch.setattr(trady.interception.deferred_segment, "_PART_BYTES", {"cpu": 1, "meta": 1})
    yield
    assert _get_current_function_mode_stack() == []


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of every segment computed, forward and backward."""
    counts: list[int] = []
    plain = recompute.Recipe.chunks

    def counted(recipe: recompute.Recipe) -> Iterator[recompute.Chunk]:
        found = list(plain(recipe))
        counts.append(len(found))
        return iter(found)

    monkeypatch.setattr(recompute.Recipe, "chunks", counted)
    return counts


def anew(model: nn.Module, example: Any, **options: Any) -> trady.Tuner:
    """Every channel of every layer trains, every segment is computed anew."""
    return armed(model, example, **{"recompute": "all", **options})


def worst(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> float:
    """Relative error of the gradient that is furthest from the dense model's, and of the loss.

    A gradient that is nothing but rounding (that of queries and keys where a sentence has one token) is held against
    a millionth of the largest one instead of its own noise.
    """
    expected = dense_gradients(model, tuner, loss)
    dense = copy.deepcopy(model)
    freeze_norms(dense)
    with torch.no_grad():
        plain = loss(dense)
    for parameter in tuner.parameters():
        parameter.grad = None
    found_loss = loss(model)
    found_loss.backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    errors = [float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items()]
    return max(relative_error(found_loss, plain), *errors)


def close(name: str) -> float:
    """How near to the dense model: transformers computes the loss of language models in float32."""
    return 1e-6 if "loss" in name else 1e-10


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
    state = program.write(torch.exp, (normal(2, 3),), {}, shown=[0])
    assert program.write(Tensor.to, (state, torch.float32), {}, shown=[0]) is state
    assert len(program.shown) == 1


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


def right_or_refused(
    model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor], *, refusable: bool
) -> None:
    """What takes another path than the example inside of a segment may be refused, and says what to do."""
    try:
        assert worst(model, tuner, loss) < 1e-10
    except ModelError as error:
        if not refusable:
            raise
        assert "prepare with an example of that kind" in str(error)  # noqa: PT017


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
    slope = sum((p.grad * d).sum() for p, d in zip(compact, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(compact, directions, strict=True):
                p += step * d
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


# -- other batches than the example ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 7), (9, 7), (4, 5), (4, 14), (3, 1)])
@pytest.mark.parametrize("name", ["BERT", "GPT-2, loss", "Llama, loss"])
def test_batches_of_other_sizes_and_lengths(name: str, shape: tuple[int, int], parts: list[int]) -> None:
    model, example = recomputed_model(name)
    tuner = anew(model, example)
    batch = {"input_ids": tokens(*shape, seed=5)}
    if "labels" in example:
        if shape[1] == 1:  # nothing to predict
            return
        batch["labels"] = tokens(*shape, seed=6)
    assert worst(model, tuner, loss_of(batch)) < close(name)
    assert {shape[0]} == set(parts)
    assert worst(model, tuner, loss_of(example)) < close(name)
    tuner.finish()


@pytest.mark.parametrize("name", ["Swin", "ConvNeXt", "EfficientNet, by hand", "MobileNetV3, by hand"])
@pytest.mark.parametrize("shape", [(4, 16), (1, 16), (7, 32), (3, 24)])
def test_images_of_other_sizes(name: str, shape: tuple[int, int]) -> None:
    model, example = recomputed_model(name)
    tuner = anew(model, example)
    x = normal(shape[0], 3, shape[1], shape[1], seed=8, dtype=torch.float64)
    batch = {"pixel_values": x} if isinstance(example, dict) else x
    right_or_refused(model, tuner, loss_of(batch), refusable=name == "Swin" and shape[1] == 24)  # it pads its windows
    tuner.finish()


class Flattened(nn.Module):
    """A segment that is entered by tokens without a batch dimension, and one inside that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.up = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 64)
        self.down, self.query, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embedding(ids).flatten(0, 1))
        x = x + self.down(F.gelu(self.up(x)))
        y = self.query(F.layer_norm(x, (16,))).unflatten(0, ids.shape)
        y = F.scaled_dot_product_attention(y, y.tanh(), y.sigmoid()).flatten(0, 1)
        x = x + self.down(F.gelu(self.up(y)))
        return self.head(x).unflatten(0, ids.shape).mean(1)


@pytest.mark.parametrize("shape", [(4, 7), (4, 14), (4, 10), (2, 3), (5, 28), (1, 1)])
def test_samples_of_another_size_in_flattened_tokens(shape: tuple[int, int]) -> None:
    model = seeded(Flattened).double()
    tuner = anew(model, tokens(4, 7))
    assert tuner.plan.recomputable > 0
    assert worst(model, tuner, loss_of(tokens(*shape, seed=3))) < 1e-10
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "BERT, eager attention", "DistilBERT", "GPT-2", "Llama"])
@pytest.mark.parametrize("masked", ["the example", "the batch", "both"])
def test_padded_batches(name: str, masked: str, parts: list[int]) -> None:
    """A mask adds calls to the forward pass, or takes some away: on the way to what the weights compute."""
    model, plain = recomputed_model(name)
    padded = {**plain, "attention_mask": padding(4, 7)}
    tuner = anew(model, plain if masked == "the batch" else padded)
    parts.clear()
    # Without a mask, grouped keys are not repeated, and eager attention adds nothing: other calls in a segment.
    refusable = masked != "both" and name in ("Llama", "BERT, eager attention")
    right_or_refused(model, tuner, loss_of(plain if masked == "the example" else padded), refusable=refusable)
    if masked == "both" or (masked == "the example" and not refusable):
        assert len(parts) >= 2 * 3
        assert {4} == set(parts)
    # A mask that the example had not: whether it is one of samples was not seen.
    assert worst(model, tuner, loss_of(padded if masked != "the batch" else plain)) < 1e-10
    tuner.finish()


@pytest.mark.parametrize("name", ["BART", "T5"])
def test_padded_batches_of_encoder_and_decoder(name: str, parts: list[int]) -> None:
    model, plain = recomputed_model(name)
    padded = {**plain, "attention_mask": padding(4, 7), "decoder_attention_mask": padding(4, 5)}
    tuner = anew(model, padded)
    assert worst(model, tuner, loss_of(padded)) < 1e-10
    assert set(parts) == {4}
    tuner.finish()


def test_a_mask_without_padding_is_a_path_of_its_own() -> None:
    """transformers looks at the values of a mask and leaves it out if nothing is padded."""
    model, plain = recomputed_model("BERT")
    full = {**plain, "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    padded = {**plain, "attention_mask": padding(4, 7)}
    tuner = anew(model, full)
    for batch in (full, padded, plain):
        assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


def test_inputs_that_are_not_contiguous_and_channels_last() -> None:
    model, x = recomputed_model("EfficientNet, by hand")
    model = model.to(memory_format=torch.channels_last)
    tuner = anew(model, x.contiguous(memory_format=torch.channels_last))
    for batch in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x.expand(2, *x.shape)[1]):
        assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()
    model, batch = recomputed_model("BERT")
    tuner = anew(model, batch)
    ids = tokens(7, 4).t()
    assert not ids.is_contiguous()
    assert worst(model, tuner, loss_of({"input_ids": ids})) < 1e-10
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


def worst_of_few(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> float:
    """As :func:`worst`, for networks of a few layers."""
    expected = dense_gradients(model, tuner, loss)
    for parameter in tuner.parameters():
        parameter.grad = None
    loss(model).backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    assert expected
    return max(relative_error(found[n], g) for n, g in expected.items())


def test_a_loss_over_nothing_is_what_pytorch_says() -> None:
    model, batch = recomputed_model("GPT-2, loss")
    tuner = anew(model, batch)
    loss = model(batch["input_ids"], labels=torch.full((4, 7), -100)).loss
    assert torch.isnan(loss)
    tuner.finish()


def _four_layers() -> Iterator[nn.Linear]:
    return (nn.Linear(a, b) for a, b in ((8, 16), (16, 64), (64, 16), (16, 3)))


class LossInside(nn.Module):
    """Scales what it computes by a loss over the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.down, self.head = _four_layers()

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


# -- what the model hands out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen2"])
def test_keys_and_values_that_are_handed_on(name: str, cached: bool) -> None:
    model, batch = recomputed_model(name)
    batch = {**batch, "use_cache": cached}
    tuner = anew(model, batch)

    def loss(network: nn.Module) -> Tensor:
        output = network(**batch)
        total = output.logits.square().sum()
        if cached:
            for layer in output.past_key_values.layers:
                assert not layer.keys.is_meta
                total = total + layer.keys.square().sum() + (layer.values**3).sum()
        return total

    assert worst(model, tuner, loss) < 1e-10
    tuner.finish()


def test_a_cache_that_goes_into_the_next_call_is_right_or_refused() -> None:
    model, batch = recomputed_model("GPT-2")
    tuner = anew(model, {**batch, "use_cache": True})

    def loss(network: nn.Module) -> Tensor:
        first = network(**batch, use_cache=True)
        second = network(tokens(4, 3, seed=9), past_key_values=first.past_key_values)
        return second.logits.square().sum()

    right_or_refused(model, tuner, loss, refusable=True)
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
@pytest.mark.parametrize("known", [True, False], ids=["in the example", "later"])
def test_hidden_states(name: str, known: bool) -> None:
    model, batch = recomputed_model(name)
    asking = {**batch, "output_hidden_states": True}
    tuner = anew(model, asking if known else batch)

    def loss(network: nn.Module) -> Tensor:
        states = network(**asking).hidden_states
        return sum((s * normal(*s.shape, seed=i, dtype=torch.float64)).sum() for i, s in enumerate(states))

    if known:
        assert worst(model, tuner, lambda m: loss(m) + call(m, batch).logits.sum()) < 1e-10
    else:
        try:
            assert worst(model, tuner, lambda m: loss(m) + call(m, batch).logits.sum()) < 1e-10
        except ModelError as error:
            assert "prepare with an example" in str(error)  # noqa: PT017
    assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


def join(tuner: trady.Tuner, example: Any, count: int) -> None:
    """Join neighbouring segments as a small budget would."""
    found, _ = find_recomputable(tuner.model, example, tuner._examined)
    tuner._armed.interceptor.recompute({mode: merged(segments, count) for mode, segments in found.items()})


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
def test_hidden_states_between_joined_segments(name: str, count: int, parts: list[int]) -> None:
    """The model keeps what one segment hands to the next: it has to exist though both are one."""
    model, batch = recomputed_model(name)
    asking = {**batch, "output_hidden_states": True}
    plain = [state.detach() for state in copy.deepcopy(model)(**asking).hidden_states]
    tuner = anew(model, asking)
    join(tuner, asking, count)
    for found, expected in zip(model(**asking).hidden_states, plain, strict=True):
        assert relative_error(found, expected) < 1e-12

    def loss(network: nn.Module) -> Tensor:
        output = network(**asking)
        states = enumerate(output.hidden_states)
        return output.logits.sum() + sum((s * normal(*s.shape, seed=i, dtype=torch.float64)).sum() for i, s in states)

    parts.clear()
    assert worst(model, tuner, loss) < 1e-10
    assert len(parts) == 2 * -(-tuner.plan.recomputable // count), "not joined"
    tuner.finish()


class TwoLosses(nn.Module):
    """A loss behind each block; the first one ends a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 32), nn.ModuleList(TokenBlock(32, 4, 0.0) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(32, 50) for _ in range(2))

    def forward(self, x: Tensor, target: Tensor) -> list[Tensor]:
        x, losses = self.first(x), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            losses.append(F.cross_entropy(head(x).flatten(0, 1), target.flatten()))
        return losses


def test_a_loss_between_segments_is_not_joined_into_the_middle_of_one() -> None:
    model, x = seeded(TwoLosses).double(), normal(4, 6, 8, dtype=torch.float64)
    batch = (x, tokens(4, 6))
    tuner = anew(model, batch)
    join(tuner, batch, 8)
    assert worst_of_few(model, tuner, lambda m: sum(m(*batch))) < 1e-10
    tuner.finish()


@pytest.mark.parametrize("known", [True, False], ids=["in the example", "later"])
def test_attention_maps_are_right_or_refused(known: bool) -> None:
    """They lie inside of a segment: who asks for them only later must not get tensors without memory."""
    model, batch = recomputed_model("BERT, eager attention")
    asking = {**batch, "output_attentions": True}
    tuner = anew(model, asking if known else batch)

    def loss(network: nn.Module) -> Tensor:
        output = network(**asking)
        maps = enumerate(output.attentions)
        total = sum((a * normal(*a.shape, seed=i, dtype=torch.float64)).sum() for i, a in maps)
        return output.logits.square().sum() + total

    if known:
        assert worst(model, tuner, loss) < 1e-10
    else:
        try:
            assert worst(model, tuner, loss) < 1e-10
        except ModelError as error:
            assert "example" in str(error)  # noqa: PT017
    assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


class Shows(nn.Module):
    """Hands out an inner activation only if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head, self.shows = (
            nn.Linear(8, 32),
            TokenBlock(32, 4, 0.0),
            nn.Linear(32, 3),
            False,
        )

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        y = self.block.fc2(F.gelu(self.block.fc1(self.block.norm2(x))))
        out = self.head((x + y).mean(1))
        return (out, y) if self.shows else out


def test_an_inner_activation_that_is_handed_out_only_later_is_refused() -> None:
    model, x = seeded(Shows).double(), normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, x)
    assert tuner.plan.recomputable > 0
    model.shows = True
    with pytest.raises(ModelError, match="example"):
        model(x)
    model.shows = False
    assert worst_of_few(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()
    model.shows = True
    tuner = anew(model, x)

    def loss(network: nn.Module) -> Tensor:
        out, y = network(x)
        return out.square().sum() + y.square().sum()

    assert worst_of_few(model, tuner, loss) < 1e-10
    tuner.finish()


def test_a_hook_that_keeps_an_inner_activation_gets_the_real_one() -> None:
    model, x = recomputed_model("ViT, by hand")
    tuner = anew(model, x)
    expected: list[Tensor] = []
    found: list[Tensor] = []
    plain = copy.deepcopy(model)
    plain.blocks[0].fc1.register_forward_hook(lambda module, args, output: expected.append(output.detach()))
    handle = model.blocks[0].fc1.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    plain(x)
    assert worst(model, tuner, loss_of(x)) < 1e-10
    assert relative_error(found[-1], expected[0]) < 1e-12
    handle.remove()
    assert worst(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()


# -- passes ------------------------------------------------------------------------------------------------------


def test_autocast_is_as_near_to_float32_as_pytorch() -> None:
    for name in ("BERT", "GPT-2, loss", "ViT, by hand", "Llama"):
        model, batch = recomputed_model(name, torch.float32)
        exact = copy.deepcopy(model)
        tuner = anew(model, batch)

        def loss(network: nn.Module, batch: Any = batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(batch)(network)

        plain = dense_gradients(exact, tuner, loss)
        reference = dense_gradients(exact, tuner, loss_of(batch))
        assert torch.is_autocast_enabled("cpu") is False
        loss(model).backward()
        found = gradients(tuner)
        for parameter, gradient in reference.items():
            limit = 2 * relative_error(plain[parameter], gradient) + 1e-2
            assert relative_error(found[parameter], gradient) < limit, (name, parameter)
        tuner.finish()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["GPT-2, loss", "Swin"])
def test_passes_without_gradients_between_passes_with(name: str, train: bool, context: Any) -> None:
    model, batch = recomputed_model(name)
    plain = copy.deepcopy(model)
    tuner = anew(model, batch)
    for _ in range(2):
        with context():
            model.train(train)
            found, expected = loss_of(batch)(model), loss_of(batch)(plain)
            assert not found.requires_grad
            assert relative_error(found.clone(), expected.clone()) < min(close(name), 1e-6)
        model.train()
        assert worst(model, tuner, loss_of(batch)) < close(name)
    tuner.finish()


def test_gradients_accumulate_over_batches() -> None:
    name = "Llama, loss"
    model, batch = recomputed_model(name)
    other = {"input_ids": tokens(3, 6, seed=5), "labels": tokens(3, 6, seed=6)}
    tuner = anew(model, batch)

    def both(network: nn.Module) -> Tensor:
        return loss_of(batch)(network) + loss_of(other)(network)

    expected = dense_gradients(model, tuner, both)
    loss_of(batch)(model).backward()
    loss_of(other)(model).backward()
    found = gradients(tuner)
    assert all(relative_error(found[n], g) < close(name) for n, g in expected.items())
    assert worst(model, tuner, both) < close(name)  # two forward passes, one backward pass
    first, second = loss_of(batch)(model), loss_of(other)(model)
    for parameter in tuner.parameters():
        parameter.grad = None
    second.backward()
    first.backward()
    found = gradients(tuner)
    assert all(relative_error(found[n], g) < close(name) for n, g in expected.items())
    tuner.finish()


@pytest.mark.parametrize("name", ["BERT", "GPT-2, loss"])
def test_two_backward_passes_through_one_graph(name: str) -> None:
    model, batch = recomputed_model(name)
    tuner = anew(model, batch)
    expected = dense_gradients(model, tuner, loss_of(batch))
    loss = loss_of(batch)(model)
    loss.backward(retain_graph=True)
    loss.backward()
    found = gradients(tuner)
    assert all(relative_error(found[n], 2 * g) < close(name) for n, g in expected.items())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    tuner.finish()


def test_gradients_of_the_inputs() -> None:
    model, x = recomputed_model("ViT, by hand")
    tuner = anew(model, x)
    x.requires_grad_(True)
    dense = copy.deepcopy(model)
    (expected,) = torch.autograd.grad(loss_of(x)(dense), x)
    loss_of(x)(model).backward()
    assert relative_error(x.grad, expected) < 1e-10
    tuner.finish()


class Fails(nn.Module):
    """Raises inside of a segment when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(8, 32), TokenBlock(32, 4, 0.0), nn.Linear(32, 3)
        self.error: BaseException | None = None
        self.block.proj.register_forward_pre_hook(self._fail)

    def _fail(self, module: nn.Module, args: Any) -> None:
        if self.error is not None:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.first(x)).mean(1))


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_forward_that_raises_inside_of_a_segment_leaves_the_next_one_as_it_was(error: BaseException) -> None:
    model, x = seeded(Fails).double(), normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, x)
    assert tuner.plan.recomputable > 0
    for _ in range(2):
        model.error = error
        with pytest.raises(type(error)):
            model(x)
        model.error = None
        assert torch.equal(F.gelu(torch.zeros(2)), torch.zeros(2))
        assert worst(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()


def test_a_backward_pass_that_raises_inside_of_a_segment_leaves_the_next_one_as_it_was() -> None:
    model, batch = recomputed_model("BERT")
    tuner = anew(model, batch)
    plain = torch.get_rng_state()
    loss = loss_of(batch)(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    tuner._armed.on_gradient.append(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    tuner._armed.on_gradient.remove(fail)
    assert _get_current_function_mode_stack() == []
    assert torch.equal(plain, torch.get_rng_state())
    assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


def test_submodules_called_alone() -> None:
    model, x = recomputed_model("ViT, by hand")
    plain = copy.deepcopy(model)
    tuner = anew(model, x)
    hidden = normal(4, 10, 32, dtype=torch.float64)
    for path in ("blocks", "blocks.0", "blocks.1", "blocks.0.fc1", "norm"):
        expected = plain.get_submodule(path)(hidden)
        assert relative_error(model.get_submodule(path)(hidden), expected) < 1e-12, path
        longer = normal(2, 13, 32, dtype=torch.float64)
        assert relative_error(model.get_submodule(path)(longer), plain.get_submodule(path)(longer)) < 1e-12, path

    def loss(network: nn.Module) -> Tensor:
        return network.blocks[1](network.blocks[0](hidden)).square().sum() + network(x).sum()

    assert worst(model, tuner, loss) < 1e-10
    tuner.finish()


def test_a_copy_is_the_plain_model() -> None:
    model, batch = recomputed_model("BERT")
    expected = call(copy.deepcopy(model), batch).logits
    tuner = anew(model, batch)
    loss_of(batch)(model).backward()
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin, batch).logits, expected)
    tuner.finish()
    assert torch.equal(call(model, batch).logits, expected)


def test_a_backward_pass_after_channels_were_drawn_anew_is_refused() -> None:
    model, batch = recomputed_model("BERT")
    table = trady.plan(model, batch, policy="full").table
    elements = sum(layer.channels * layer.elements for layer in table) // 10
    tuner = trady.prepare(model, batch, budget=f"elements:{elements}", policy="dynamic-random", recompute="all")
    loss = loss_of(batch)(model)
    tuner.resample(1)
    with pytest.raises(trady.errors.StateError, match="drawn anew"):
        loss.backward()
    assert worst(model, tuner, loss_of(batch)) < 1e-10
    tuner.finish()


@pytest.mark.parametrize("what", ["weight", "channels", "norm"])
def test_a_parameter_that_changes_between_forward_and_backward_is_refused(what: str) -> None:
    model, x = recomputed_model("ViT, by hand")
    tuner = anew(model, x)
    loss = loss_of(x)(model)
    with torch.no_grad():
        if what == "weight":
            model.blocks[0].fc2.weight.mul_(1.1)
        elif what == "norm":
            model.blocks[1].norm2.weight.mul_(1.1)
        else:
            dict(tuner.named_parameters())["blocks.0.fc1.weight.channels"].mul_(1.1)
            model(x)  # writes it back
    with pytest.raises(RuntimeError, match=r"changed|modified"):
        loss.backward()
    tuner.finish()


# -- what must not be cut ----------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Blocks in which samples meet, each in another way."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = _four_layers()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(F.gelu(self.mix(F.gelu(self.up(x)))))
        return self.head(x).mean(1)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "less the mean of the batch": lambda x: x - x.mean(0, keepdim=True),
    "less the mean of all": lambda x: x - x.mean(),
    "softmax over the batch": lambda x: x.softmax(0),
    "rolled": lambda x: torch.roll(x, dims=0, shifts=1),
    "flipped": lambda x: x.flip(0),
    "sorted": lambda x: x.sort(0).values,
    "cumulated": lambda x: x.cumsum(0),
    "shuffled": lambda x: x[torch.tensor([2, 0, 3, 1])[: x.shape[0]]] if len(x) == 4 else x.flip(0),
    "halves exchanged": lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]]),
    "first one added": lambda x: x + x[:1],
    "transposed and back": lambda x: x.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1),
    "compared": lambda x: torch.einsum("btc,dtc->bdt", x, x).mean(1).unsqueeze(2) * x,
    "normalised over the batch": lambda x: F.normalize(x, p=2, dim=0),
    "scaled by the norm": lambda x: x / x.norm(),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "by a matrix": lambda x: (x.permute(2, 1, 0) @ x.permute(2, 0, 1)).mean((0, 1)).sum() * x,
    "batch statistics": lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
}


def parts_around(mix: Callable[[Tensor], Tensor], parts: list[int]) -> set[int]:
    """In how many parts four samples are computed anew where ``mix`` is done to them; gradients are right anyway."""
    model, x = seeded(lambda: Mixing(mix)).double(), normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, x)
    assert tuner.plan.recomputable > 0
    parts.clear()
    assert worst_of_few(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()
    return set(parts)


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_meet_stay_together(name: str, parts: list[int]) -> None:
    assert parts_around(MIXING[name], parts) == {1}


SEPARATE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "softmax over features": lambda x: x.softmax(-1),
    "heads": lambda x: x.unflatten(-1, (4, 16)).transpose(1, 2).softmax(-2).transpose(1, 2).flatten(2),
    "tokens flattened": lambda x: x.reshape(-1, x.shape[-1]).relu().reshape(x.shape),
    "batch behind": lambda x: x.transpose(0, 1).softmax(0).transpose(0, 1),
    "tokens rolled": lambda x: torch.roll(x, dims=1, shifts=1),
    "tokens padded": lambda x: F.pad(x, (0, 0, 1, -1)),
    "own mean": lambda x: x - x.mean((1, 2), keepdim=True),
    "attention": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "drop path": lambda x: x * x.new_ones(x.shape[0], 1, 1).floor_(),
    "mean of a constant": lambda x: x * torch.arange(4.0, dtype=x.dtype).mean(),
    "in place": lambda x: x.mul(2).add_(1).clamp_(max=3),
    "split": lambda x: torch.cat([p.tanh() for p in x.chunk(2, -1)][::-1], -1),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_samples_that_do_not_meet_are_computed_one_by_one(name: str, parts: list[int]) -> None:
    assert parts_around(SEPARATE[name], parts) == {4}


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(8, 32), TokenBlock(32, 4, 0.0), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.first(x))).mean(1))


def test_a_block_that_is_called_twice() -> None:
    model, x = seeded(SharedBlock).double(), normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, x)
    assert tuner.plan.recomputable > 0
    assert worst(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()


class Counts(nn.Module):
    """Writes into a buffer, by way of what was computed; and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = _four_layers()
        self.register_buffer("running", torch.zeros(64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = F.gelu(self.up(x))
        self.running.lerp_(h.detach().mean((0, 1)), 0.5)
        self.calls += 1
        return self.head((x + self.down(F.gelu(h))).mean(1))


def test_buffers_are_written_once_a_forward_pass() -> None:
    model, x = seeded(Counts).double(), normal(4, 6, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    plain(x)
    tuner = anew(model, x)
    model(x).sum().backward()
    tuner.finish()
    assert torch.equal(model.calls, plain.calls)
    assert relative_error(model.running, plain.running) < 1e-12


class OneSizeOnly(nn.Module):
    """Has the size of the batch written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = _four_layers()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(F.gelu(F.gelu(self.up(x)).view(4, 6, 64)))
        return self.head(x.view(4, 6, 16).mean(1))


def test_a_model_for_batches_of_one_size() -> None:
    model, x = seeded(OneSizeOnly).double(), normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, x)
    assert worst_of_few(model, tuner, loss_of(x)) < 1e-10
    tuner.finish()


class Remembers(nn.Module):
    """Overwrites its own input, and a mask after it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = _four_layers()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = keep.unsqueeze(-1).float()
        x = self.first(x)
        h = F.gelu(self.up(x)) + mask
        mask.zero_()
        h = F.gelu(h + mask)
        keep.logical_not_()
        return self.head((x + self.down(h).masked_fill(keep.unsqueeze(-1), 1)).mean(1))


def test_masks_that_are_overwritten() -> None:
    model = seeded(Remembers).double()
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    x = normal(4, 6, 8, dtype=torch.float64)
    tuner = anew(model, {"x": x, "keep": keep.clone()})
    assert worst_of_few(model, tuner, lambda m: m(x, keep.clone()).square().sum()) < 1e-10
    tuner.finish()


# -- rules of batching, at random --------------------------------------------------------------------------------


class Steps(nn.Module):
    def __init__(self, steps: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def _dims(x: Tensor, d: int) -> int:
    return d % x.dim()


#: From a dimension, chosen at random, to a step; some fit few shapes.
RANDOM_STEPS: list[Callable[[int], Callable[[Tensor], Tensor]]] = [
    lambda d: lambda x: x * 2 + 1,
    lambda d: lambda x: x * x,
    lambda d: lambda x: x.softmax(_dims(x, d)),
    lambda d: lambda x: F.log_softmax(x, dim=_dims(x, d)),
    lambda d: lambda x: x.cumsum(dim=_dims(x, d)),
    lambda d: lambda x: x.transpose(_dims(x, d), -1),
    lambda d: lambda x: x.transpose(0, _dims(x, d)),
    lambda d: lambda x: x.permute(*range(1, x.dim()), 0),
    lambda d: lambda x: x.flatten(_dims(x, d)),
    lambda d: lambda x: x.flatten(0, _dims(x, d)),
    lambda d: lambda x: x.reshape(-1, x.shape[_dims(x, d)]),
    lambda d: lambda x: x.reshape(x.shape[_dims(x, d)], -1),
    lambda d: lambda x: x.reshape(x.shape[-1], x.shape[0], -1),
    lambda d: lambda x: x.unflatten(_dims(x, d), (2, -1)),
    lambda d: lambda x: x.unflatten(_dims(x, d), (-1, 2)),
    lambda d: lambda x: x.chunk(2, _dims(x, d))[-1],
    lambda d: lambda x: x.unbind(_dims(x, d))[0],
    lambda d: lambda x: x.select(_dims(x, d), 0),
    lambda d: lambda x: x.narrow(_dims(x, d), 0, x.shape[_dims(x, d)]),
    lambda d: lambda x: x[1:],
    lambda d: lambda x: x[..., :-1],
    lambda d: lambda x: x[:, ::2],
    lambda d: lambda x: x[::2],
    lambda d: lambda x: x[torch.arange(x.shape[0]).flip(0)],
    lambda d: lambda x: x[:, torch.tensor([0, 1])],
    lambda d: lambda x: x.roll(1, _dims(x, d)),
    lambda d: lambda x: torch.roll(x, dims=_dims(x, d), shifts=1),
    lambda d: lambda x: torch.roll(x, shifts=(1, 1), dims=(_dims(x, d), x.dim() - 1)),
    lambda d: lambda x: x.flip(_dims(x, d)),
    lambda d: lambda x: torch.cat([x, x + 1], _dims(x, d)),
    lambda d: lambda x: torch.stack([x, x + 1], _dims(x, d)),
    lambda d: lambda x: x @ x.transpose(-1, -2),
    lambda d: lambda x: x.transpose(-1, -2) @ x,
    lambda d: lambda x: x.mean(_dims(x, d)),
    lambda d: lambda x: x - x.mean(_dims(x, d), keepdim=True),
    lambda d: lambda x: x + x.sum(dim=_dims(x, d), keepdim=True),
    lambda d: lambda x: x.amax(_dims(x, d)),
    lambda d: lambda x: x - x.mean(),
    lambda d: lambda x: F.normalize(x, 2, _dims(x, d)),
    lambda d: lambda x: F.layer_norm(x, x.shape[_dims(x, d) :]),
    lambda d: lambda x: x.unsqueeze(_dims(x, d)),
    lambda d: lambda x: x.unsqueeze(_dims(x, d)).squeeze(),
    lambda d: lambda x: x.squeeze(_dims(x, d)),
    lambda d: lambda x: x.unsqueeze(_dims(x, d)) * x.unsqueeze(-1),
    lambda d: lambda x: x.unsqueeze(0) + x.unsqueeze(1),
    lambda d: lambda x: x.expand(3, *x.shape),
    lambda d: lambda x: x.repeat(2, *(1,) * (x.dim() - 1)),
    lambda d: lambda x: x.gather(_dims(x, d), torch.zeros_like(x, dtype=torch.long)),
    lambda d: lambda x: x.index_select(_dims(x, d), torch.tensor([1, 0])),
    lambda d: lambda x: F.pad(x, (1, 1)),
    lambda d: lambda x: F.pad(x, (1, -1)),
    lambda d: lambda x: F.pad(x, (0, 0, 1, -1)),
    lambda d: lambda x: x.tril(),
    lambda d: lambda x: F.glu(torch.cat([x, x], -1), _dims(x, d)),
    lambda d: lambda x: F.scaled_dot_product_attention(x, x, x),
    lambda d: lambda x: F.group_norm(x, 1),
    lambda d: lambda x: F.instance_norm(x),
    lambda d: lambda x: F.interpolate(x, scale_factor=2),
    lambda d: lambda x: F.max_pool1d(x, 2),
    lambda d: lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda d: lambda x: x.logsumexp(_dims(x, d)),
    lambda d: lambda x: x.std(_dims(x, d), keepdim=True) * x,
    lambda d: lambda x: torch.where(x > 0, x, x.new_zeros(x.shape)),
    lambda d: lambda x: x.unfold(_dims(x, d), 2, 2),
    lambda d: lambda x: x.unfold(_dims(x, d), 2, 1),
    lambda d: lambda x: x.masked_fill(x > x.mean(_dims(x, d), keepdim=True), 0.5),
    lambda d: lambda x: F.linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype)),
    lambda d: lambda x: F.embedding(torch.arange(x.shape[0]).flip(0), x),
    lambda d: lambda x: torch.einsum("b...,b...->...", x, x),
    lambda d: lambda x: x.movedim(_dims(x, d), 0),
    lambda d: lambda x: x.swapaxes(0, _dims(x, d)),
    lambda d: lambda x: x.div(x.shape[0]),
]


@pytest.mark.filterwarnings("ignore:std")
@settings(max_examples=150)
@given(
    rest=st.sampled_from([(3,), (4, 6), (2, 4, 6), (4, 4), (2, 2, 2, 4)]),
    chosen=st.lists(st.tuples(st.integers(0, len(RANDOM_STEPS) - 1), st.integers(0, 4)), min_size=1, max_size=5),
    cut=st.integers(1, 3),
)
def test_what_is_said_to_be_by_sample_can_be_computed_in_parts(
    rest: tuple[int, ...], chosen: list[tuple[int, int]], cut: int
) -> None:
    x = normal(4, *rest, dtype=torch.float64)
    steps: list[Callable[[Tensor], Tensor]] = []
    value = x
    for number, dim in chosen:
        step = RANDOM_STEPS[number](dim)
        try:
            value = step(value)
        except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
            continue
        if value.numel() > 20000 or value.numel() == 0:
            return
        steps.append(step)
    model = Steps(steps)
    trace = trace_forward(model, x)
    try:
        doubled = trace_forward(model, twice(x))
    except ModelError:
        return
    samples = samples_of(trace, doubled)
    if not samples or any(found is None for found in samples):
        return
    last = samples[-1]
    assert last is not None
    along = last.made[0] if last.made else None
    if along is None:
        return
    whole = model(x)
    found = torch.cat([model(x[:cut]), model(x[cut:])], along.dim)
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("number", range(len(RANDOM_STEPS)))
def test_every_rule_alone_in_every_dimension(number: int) -> None:
    for rest in ((3,), (4, 6), (2, 4, 6), (4, 4)):
        for before in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x.flatten(0, 1)):
            for dim in range(4):
                step = RANDOM_STEPS[number](dim)
                model, x = Steps([before, step]), normal(4, *rest, dtype=torch.float64)
                try:
                    whole = model(x)
                    parted = [model(x[:1]), model(x[1:])]
                    samples = samples_of(trace_forward(model, x), trace_forward(model, twice(x)))
                except (RuntimeError, IndexError, ValueError, ZeroDivisionError, ModelError):
                    continue
                last = samples[-1] if samples and all(found is not None for found in samples) else None
                along = last.made[0] if last is not None and last.made else None
                if along is not None:
                    torch.testing.assert_close(torch.cat(parted, along.dim), whole, rtol=1e-9, atol=1e-9)


def test_where_samples_lie() -> None:
    def made(step: Callable[[Tensor], Tensor], *shape: int) -> list[SampleAxis | None]:
        model, x = Steps([step]), normal(*shape)
        found = samples_of(trace_forward(model, x), trace_forward(model, twice(x)))
        return [entry.made[0] if entry is not None else None for entry in found]

    assert made(lambda x: x.flatten(0, 1), 4, 3, 5) == [SampleAxis(0, 3)]
    assert made(lambda x: x.transpose(0, 1), 4, 3, 5) == [SampleAxis(1, 1)]
    assert made(lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)), 4, 3, 5) == [SampleAxis(0, 3), SampleAxis(0, 1)]
    assert made(lambda x: x.transpose(0, 1).flatten(0, 1), 4, 3, 5) == [SampleAxis(1, 1), None]
    assert made(lambda x: x.unbind(0)[0], 4, 3) == [None]
    assert made(lambda x: x.transpose(0, 1).reshape(3 * len(x), 5), 4, 3, 5)[-1] is None


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BERT", "GPT-2, loss", "ViT, by hand", "EfficientNet, by hand"])
def test_what_is_kept_is_what_enters_the_segments_and_what_lies_outside(name: str) -> None:
    model, batch = recomputed_model(name, torch.float32)
    ledgers = {}
    for mode in ("none", "all"):
        tuner = armed(model, batch, recompute=mode)
        ledgers[mode] = tuner.ledger(lambda: loss_of(batch)(model).backward())
        if mode == "all":
            segments = tuner._drawing.recomputation.segments[True]
            entries = sum(segment.entry_bytes for segment in segments)
        tuner.finish()
    anchors = ledgers["all"].saved_bytes_of("anchors")
    assert 0 < anchors <= entries
    assert ledgers["all"].saved_bytes < 0.5 * ledgers["none"].saved_bytes
    inside = {segment.name for segment in segments}
    others = [s for s in ledgers["all"].saved if s.kind != "anchors" and s.layer in inside]
    assert sum(s.bytes for s in others) <= entries, others


def test_what_grows_with_depth_is_the_activations_that_enter() -> None:
    saved = []
    for depth in (2, 4):
        model, x = seeded(lambda d=depth: VisionTransformer(depth=d)), normal(4, 3, 12, 12)
        tuner = anew(model, x)
        saved.append(tuner.ledger(lambda m=model, x=x: loss_of(x)(m).backward()).saved_bytes)
        tuner.finish()
    assert saved[1] - saved[0] == 2 * 2 * 4 * 10 * 32 * 4  # two segments a block


@pytest.mark.parametrize("name", ["GPT-2, loss", "Swin"])
def test_nothing_is_alive_after_a_step_without_the_garbage_collector(name: str) -> None:
    model, batch = recomputed_model(name)
    tuner = anew(model, batch)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))

    def step() -> int:
        loss_of(batch)(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        kinds = (Tensor, nn.Parameter, Program, recompute.Recipe)
        return sum(type(thing) in kinds for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        assert step() == step()
    finally:
        gc.enable()
    tuner.finish()


def test_no_part_outlives_its_turn() -> None:
    """With the garbage collector off, the peak of a step does not grow with the number of parts."""
    peaks = []
    for batch in (2, 8):
        model, x = seeded(lambda: VisionTransformer(width=32, depth=1)), normal(batch, 3, 48, 48)
        tuner = anew(model, x)
        loss_of(x)(model).backward()
        tuner.model.zero_grad()
        gc.collect()
        gc.disable()
        try:
            ledger = tuner.ledger(lambda m=model, x=x: loss_of(x)(m).backward(), inference=False)
        finally:
            gc.enable()
        peaks.append(ledger.working_peak_bytes)
        tuner.finish()
    tokens_bytes = 6 * (12 * 12 + 1) * 32 * 4  # six samples more
    assert peaks[1] - peaks[0] < 8 * tokens_bytes  # attention maps of a sample alone are 4 * 145 times as wide


def test_a_forward_pass_that_is_let_go_leaves_nothing_alive() -> None:
    model, batch = recomputed_model("BERT")
    tuner = anew(model, batch)

    def alive() -> int:
        model(**batch)
        return sum(type(thing) in (Tensor, Program, recompute.Recipe) for thing in gc.get_objects())

    alive()
    gc.collect()
    gc.disable()
    try:
        assert alive() == alive()
    finally:
        gc.enable()
    tuner.finish()


def test_a_part_is_as_large_as_caches_are(monkeypatch: pytest.MonkeyPatch, parts: list[int]) -> None:
    monkeypatch.setattr(
        trady.interception.deferred_segment, "_PART_BYTES", {"cpu": 2 * 7 * 64 * 8, "meta": 2 * 7 * 64 * 8}
    )
    model, _ = recomputed_model("BERT")
    tuner = anew(model, {"input_ids": tokens(5, 7)})
    assert worst(model, tuner, loss_of({"input_ids": tokens(5, 7, seed=2)})) < 1e-10
    assert max(parts) == 3  # 2 + 2 + 1 samples
    tuner.finish()
