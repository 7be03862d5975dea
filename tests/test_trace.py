"""The trace and the channel table: what a model calls, what can be updated, and what a channel costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import (
    IMAGE_NETWORKS,
    Functional,
    Residual,
    SharedLayer,
    SharedWeight,
    StaticSame,
    Tokens,
    normal,
    same,
    seeded,
    snapshot,
)
from trady.analysis.model_analysis import analyse_model
from trady.calls.actions import InPlace
from trady.errors import BudgetError, ModelError
from trady.trace.forward import trace_forward


def table(model: nn.Module, example: Any, **options: Any) -> trady.ChannelTable:
    return analyse_model(model, example, **options).table


def only(module: nn.Module, shape: tuple[int, ...]) -> trady.Layer:
    """The table's row of a layer in front of a classifier."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = module, nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).flatten(1).mean(1, keepdim=True))

    found = table(Net(), torch.zeros(shape))
    assert found.names == ("layer",)
    return found["layer"]


# Hand-computed from DESIGN section 1. module, input shape -> kind, channels, C^W, C^A, FLOPs, groups
COSTS = {
    "linear": (nn.Linear(10, 7), (4, 10), ("linear", 10, 7, 1, 7, 1)),
    "linear over tokens": (nn.Linear(10, 7), (4, 5, 10), ("linear", 10, 7, 5, 35, 1)),
    "conv1d": (nn.Conv1d(3, 8, 5, stride=2, padding=2), (4, 3, 32), ("conv1d", 3, 8 * 5, 32, 5 * 8 * 16, 1)),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), (4, 3, 16, 20), ("conv2d", 3, 8 * 9, 320, 9 * 8 * 320, 1)),
    "conv2d strided": (nn.Conv2d(3, 8, 3, stride=2), (4, 3, 15, 11), ("conv2d", 3, 72, 165, 72 * 7 * 5, 1)),
    "conv2d dilated": (nn.Conv2d(3, 8, 3, dilation=2), (4, 3, 15, 11), ("conv2d", 3, 72, 165, 72 * 11 * 7, 1)),
    "conv2d grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 8, 8), ("conv2d", 6, 4 * 9, 64, 9 * 4 * 64, 2)),
    "conv2d depthwise": (nn.Conv2d(6, 6, 3, 2, padding=1, groups=6), (4, 6, 8, 8), ("conv2d", 6, 9, 64, 9 * 16, 6)),
    "conv2d padded as a string": (nn.Conv2d(3, 8, 3, padding="same"), (4, 3, 9, 7), ("conv2d", 3, 72, 63, 72 * 63, 1)),
    "conv2d string, uneven": (nn.Conv2d(3, 8, 4, padding="same"), (4, 3, 9, 7), ("conv2d", 3, 128, 63, 128 * 63, 1)),
    "conv2d valid": (nn.Conv2d(3, 8, (3, 1), padding="valid"), (4, 3, 9, 7), ("conv2d", 3, 24, 63, 24 * 49, 1)),
    "conv3d": (nn.Conv3d(2, 4, 3), (2, 2, 5, 6, 7), ("conv3d", 2, 4 * 27, 210, 108 * 3 * 4 * 5, 1)),
    # What is saved is the map in front of the padding: 9 x 7, not 12 x 8.
    "subclass that pads": (StaticSame(3, 8, 3, stride=2), (4, 3, 9, 7), ("conv2d", 3, 72, 63, 72 * 5 * 3, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_a_channel(name: str) -> None:
    module, shape, expected = COSTS[name]
    layer = only(module, shape)
    found = (layer.kind, layer.channels, layer.weight_elements, layer.activation_elements, layer.flops, layer.groups)
    assert found == expected
    assert layer.channels * layer.weight_elements == module.get_parameter("weight").numel()
    assert layer.elements == expected[2] + expected[3]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_costs_are_of_one_sample_whatever_the_batch(batch: int) -> None:
    assert only(nn.Conv2d(3, 8, 3), (batch, 3, 8, 8)) != only(nn.Conv2d(3, 8, 3), (batch, 3, 9, 8))
    one, many = only(nn.Conv2d(3, 8, 3), (1, 3, 8, 8)), only(nn.Conv2d(3, 8, 3), (batch, 3, 8, 8))
    assert (one.elements, one.flops) == (many.elements, many.flops)


def test_costs_of_transformers_conv1d() -> None:
    found = table(Tokens(), torch.zeros(4, 6, dtype=torch.int64))
    up = found["up"]
    assert (up.kind, up.channels, up.weight_elements, up.activation_elements, up.flops) == ("addmm", 12, 36, 6, 36 * 6)
    assert found.names == ("up", "down", "mix")


def test_a_layer_used_several_times_costs_the_sum_of_its_uses() -> None:
    found = table(SharedLayer(), torch.zeros(2, 3, 7, 7))
    assert found["conv"].activation_elements == 3 * 49
    assert found["conv"].weight_elements == 6 * 9
    assert found["conv"].flops == 3 * 6 * 9 * 49
    assert len(found["conv"].input_shapes) == 3


def test_a_weight_of_two_modules_is_one_layer() -> None:
    found = table(SharedWeight(), torch.zeros(2, 3, 8, 8))
    assert found.names == ("stem", "left")
    assert found["left"].activation_elements == 64 + 16


def test_layers_come_in_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.second, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)))

    assert table(Backwards(), torch.zeros(2, 4)).names == ("first", "second")


def test_weights_of_the_root_are_told_apart() -> None:
    assert table(Functional(), torch.zeros(2, 3, 9, 9)).names == ("first", "second", "hidden")


# -- what stays frozen, and why ----------------------------------------------------------------------------------


class Frozen(nn.Module):
    """One weight for every reason not to be updated by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.tied = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.tied.weight = self.embedding.weight
        self.words, self.unused = nn.Embedding(9, 4), nn.Linear(3, 3)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.masked, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)
        self.up = nn.ConvTranspose1d(4, 4, 1)
        self.head = nn.Linear(13, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.words(ids)
        x = self.bilinear(x, x) + F.linear(x, self.masked.weight * 0.5)
        x = self.up(self.plain(x).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.cat([self.tied(x), x], -1).mean(1))


def test_weights_outside_the_table_are_listed_with_the_reason() -> None:
    found = table(Frozen(), torch.zeros(2, 5, dtype=torch.int64))
    assert found.names == ("plain",)
    reasons = {frozen.parameter: frozen.reason for frozen in found.frozen}
    expected = {"embedding", "words", "unused", "bilinear", "masked", "up", "head"}
    assert reasons.keys() == {f"{name}.weight" for name in expected}
    assert "also used by embedding" in reasons["embedding.weight"]
    assert "embedding" in reasons["words.weight"]
    assert "not used" in reasons["unused.weight"]
    assert "bilinear" in reasons["bilinear.weight"]
    assert "mul" in reasons["masked.weight"]
    assert "conv_transpose1d" in reasons["up.weight"]
    assert "head" in reasons["head.weight"]


class Sections(nn.Module):
    """Weights that are read where nothing can be intercepted when it is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(lambda x: F.relu(F.linear(x, self.first.weight)), x, use_reentrant=False)
        return self.head(checkpoint(lambda x: F.relu(self.second(x)), x, use_reentrant=False))


def test_a_weight_recomputed_outside_of_any_module_stays_frozen() -> None:
    model = seeded(Sections)
    found = table(model, torch.zeros(2, 4))
    assert found.names == ("second",)
    assert "intercepted" in {frozen.parameter: frozen.reason for frozen in found.frozen}["first.weight"]
    tuner = trady.prepare(model, torch.zeros(2, 4), budget="elements:100", policy="full")
    model(normal(2, 4)).sum().backward()
    assert dict(tuner.named_parameters())["second.weight.channels"].grad is not None
    tuner.finish()


# -- the head ----------------------------------------------------------------------------------------------------


def test_the_head_is_the_last_weight_layer_unless_named() -> None:
    example = torch.zeros(2, 3, 9, 9)
    assert analyse_model(Residual(), example).head == ("head",)
    named = analyse_model(Residual(), example, head=["head", "blocks.1"])
    assert named.head == ("head", "blocks.1")
    assert "blocks.1.conv1" not in named.table.names
    assert set(named.head_parameters) == {
        n for n, _ in Residual().named_parameters() if n.startswith(("head", "blocks.1."))
    }
    assert analyse_model(Residual(), example, head=None).head == ()
    assert "head" in analyse_model(Residual(), example, head=()).table.names
    assert analyse_model(Functional(), example).head == ("classifier", "bias")
    assert analyse_model(Functional(), example, head="classifier").head == ("classifier",)


def test_a_tied_classifier_is_no_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(F.relu(self.body(self.embedding(ids))))

    found = analyse_model(Tied(), torch.zeros(2, 5, dtype=torch.int64))
    assert (found.head, found.table.names) == ((), ("body",))


class TokenScores(nn.Module):
    """Scores each token against ``classes``, or the first one alone; reads token types beside the tokens."""

    def __init__(self, classes: int, *, first: bool = False) -> None:
        super().__init__()
        self.tokens, self.types = nn.Embedding(9, 4), nn.Embedding(2, 4)
        self.body, self.out, self.first = nn.Linear(4, 4), nn.Linear(4, classes), first

    def forward(self, ids: Tensor) -> Tensor:
        x = F.relu(self.body(self.tokens(ids) + self.types(torch.zeros_like(ids))))
        return self.out(x[:, 0] if self.first else x)


@pytest.mark.parametrize(
    ("classes", "first", "head"),
    [(9, False, ()), (9, True, ("out",)), (2, False, ("out",)), (5, False, ("out",))],
    ids=["a language model", "a classifier of sentences", "as many classes as token types", "a classifier of tokens"],
)
def test_the_output_layer_of_a_language_model_is_a_layer_like_the_others(
    classes: int, first: bool, head: tuple[str, ...]
) -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    found = analyse_model(TokenScores(classes, first=first), ids)
    assert found.head == head
    assert ("out" in found.table.names) == (head == ())
    assert analyse_model(TokenScores(classes, first=first), ids, head="out").head == ("out",)


def test_training_the_head_alone_needs_one() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for budget in (None, "elements:1000", "1 MiB"):
        with pytest.raises(ModelError, match=r"no head.*head="):
            trady.prepare(TokenScores(9), ids, policy="head", budget=budget)
        tuner = trady.prepare(TokenScores(9), ids, policy="head", budget=budget, head="out")
        assert [name for name, p in tuner.named_parameters() if p.numel()] == ["out.weight", "out.bias"]
        tuner.finish()


def test_a_head_that_is_no_module_is_refused_with_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"clasifier.*head"):
        analyse_model(Residual(), torch.zeros(2, 3, 9, 9), head="clasifier")


# -- the example -------------------------------------------------------------------------------------------------


def test_the_model_is_only_read() -> None:
    model, x = seeded(Residual), normal(2, 3, 9, 9)
    model.train()
    model.blocks[0].bn1.eval()
    before, flags = snapshot(model), [(m.training, len(m._forward_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    trady.plan(model, x, budget="2 MiB")
    assert same(snapshot(model), before)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.nn.modules.module._global_forward_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_a_model_without_memory_has_the_same_table(name: str) -> None:
    build, shape = IMAGE_NETWORKS[name]
    with torch.device("meta"):
        hollow, example = build(), torch.empty(2, *shape)
    expected = table(build(), torch.zeros(2, *shape))
    assert table(hollow, example) == expected
    assert trady.plan(hollow, example, budget="elements:900").cost.elements <= 900
    assert all(p.is_meta for p in hollow.parameters())


def test_batches_are_tensors_tuples_or_mappings() -> None:
    model, ids, mask = Tokens(), torch.zeros(3, 6, dtype=torch.int64), torch.ones(3, 6)
    one = table(model, ids)
    assert one.batch == 3
    assert one == table(model, (ids, mask)) == table(model, [ids]) == table(model, {"ids": ids, "mask": mask})

    class Batch:  # as transformers' BatchEncoding
        def keys(self) -> list[str]:
            return ["ids"]

        def __getitem__(self, key: str) -> Tensor:
            return ids

    assert table(model, Batch()) == one


def test_element_sizes_are_those_of_the_example() -> None:
    x = torch.zeros(2, 3, 9, 9)
    assert (table(Residual(), x).element_bytes, table(Residual().double(), x.double()).element_bytes) == (4, 8)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert table(Tokens().bfloat16(), ids).element_bytes == 2


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(2, 4, 9, 9), ["Residual", "2, 4, 9, 9", "one batch"]),
        (torch.zeros(2, 3), ["Residual", "2, 3"]),
        ((torch.zeros(2, 3, 9, 9), 3), ["Residual"]),
        ({"image": torch.zeros(2, 3, 9, 9)}, ["Residual", "image"]),
        (torch.zeros(0, 3, 9, 9), ["no samples"]),
        ("a batch", ["Residual"]),
    ],
    ids=["channels", "dimensions", "arguments", "keyword", "empty", "text"],
)
def test_an_example_that_the_model_cannot_run_is_refused(example: Any, words: list[str]) -> None:
    model = Residual()
    with pytest.raises(ModelError) as caught:
        trady.prepare(model, example, budget="elements:900")
    assert all(word in str(caught.value) for word in words)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_branch_on_values_that_are_not_there_is_refused_with_its_line() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return self.head(x if x.sum() > 0 else -x)

    with pytest.raises(ModelError, match=r"test_trace\.py:\d+: return self\.head\(x if x\.sum\(\) > 0 else -x\)"):
        trady.plan(Looks().to("meta"), torch.zeros(2, 4, device="meta"), budget="elements:900")


def test_a_model_without_updatable_layers_is_refused_with_what_it_has() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids).mean(1)

    with pytest.raises(ModelError, match=r"words\.weight: used by embedding"):
        trady.prepare(Words(), torch.zeros(2, 4, dtype=torch.int64), budget="elements:900")
    with pytest.raises(ModelError, match="no weights"):
        trady.prepare(nn.Sequential(nn.ReLU()), torch.zeros(2, 4), budget="elements:900")
    with pytest.raises(ModelError, match="Module"):
        trady.prepare(F.relu, torch.zeros(2, 4), budget="elements:900")  # type: ignore[arg-type]


def test_a_model_that_is_all_head_trains_its_head() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    tuner = trady.prepare(model, torch.zeros(2, 4), policy="head")
    assert [name for name, _ in tuner.named_parameters()] == ["1.weight", "1.bias"]
    tuner.finish()
    with pytest.raises(BudgetError, match="needs a budget"):
        trady.prepare(model, torch.zeros(2, 4))


def test_what_is_computed_together_is_what_nobody_else_reads() -> None:
    """A conv-norm-relu chain is one step; with a second reader of the norm's output it is not."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    steps = analyse_model(chain, torch.zeros(2, 3, 5, 5)).plans.training.steps
    assert [type(step.action).__name__ for step in steps[:3]] == ["WithLayer", "Done", "Done"]
    chain[1].register_forward_hook(lambda module, args, output: module.__dict__.__setitem__("kept", output))
    steps = analyse_model(chain, torch.zeros(2, 3, 5, 5)).plans.training.steps
    assert [type(step.action).__name__ for step in steps[:3]] == ["WithLayer", "Done", "InPlace"]
    action = steps[2].action
    assert isinstance(action, InPlace)
    assert action.overwrite is False


def test_a_trace_does_not_let_a_model_believe_that_it_has_changed_its_weights() -> None:
    """RWKV rescales its weights once, when it is first evaluated, and notes that it has."""

    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head, self.rescaled = nn.Linear(4, 4), nn.Linear(4, 2), False

        def forward(self, x: Tensor) -> Tensor:
            if self.rescaled == self.training:
                with torch.no_grad():
                    self.layer.weight.mul_(2.0 if self.training else 0.5)
                self.rescaled = not self.training
            return self.head(torch.relu(self.layer(x)))

    model, x = seeded(Rescaled), normal(3, 4)
    before = snapshot(model)
    tuner = trady.prepare(model, x, budget="update:1 kB")
    assert tuner.plan.table.names == ("layer",)
    model.train()(x).sum().backward()
    assert not model.rescaled
    tuner.finish()
    assert same(before, snapshot(model))


def test_a_trace_lists_every_call_once() -> None:
    trace = trace_forward(SharedLayer(), torch.zeros(2, 3, 7, 7), training=True)
    names = [call.function.__name__ for call in trace.calls]
    assert names.count("conv2d") == 4
    assert names.count("batch_norm") == 3
    assert trace.batch == 2
