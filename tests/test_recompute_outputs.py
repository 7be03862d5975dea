"""Segments that are recomputed: what the model hands out of them, and when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import normal, relative_error, seeded
from tests.recomputed_models import TokenBlock, call, loss_of, recomputed_model, tokens
from tests.recomputing import anew, right_or_refused, worst, worst_of_few
from trady.analysis.model_analysis import find_recomputable
from trady.analysis.segments import merged
from trady.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_sample_a_part")


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
    found, _ = find_recomputable(tuner.model, example, tuner._decision.analysis)
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
