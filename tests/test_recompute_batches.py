"""Segments that are recomputed: other batches than the example, and samples that meet."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import in_layout, normal, relative_error, seeded
from tests.recomputed_models import TokenBlock, loss_of, padding, recomputed_model, tokens
from tests.recomputing import anew, close, four_layers, right_or_refused, worst, worst_of_few

pytestmark = pytest.mark.usefixtures("one_sample_a_part")


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
    model = in_layout(model, torch.channels_last)
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


# -- what must not be cut ----------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Blocks in which samples meet, each in another way."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = four_layers()
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
    """In how many parts four samples are recomputed where ``mix`` is done to them; gradients are right anyway."""
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

    running: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = four_layers()
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
        self.first, self.up, self.down, self.head = four_layers()

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
        self.first, self.up, self.down, self.head = four_layers()

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
