"""A kind of call is one value: registered, it is traced, planned, recomputed and computed by its own handler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.models import normal, relative_error, seeded
from trady.calls.actions import Action, InPlace
from trady.calls.handling import Handling, labelled
from trady.calls.kind import Call, CallKind, Keeps
from trady.calls.mode import CallMode
from trady.calls.recognize import register, unregister
from trady.calls.sample_rules import aligned
from trady.ops.layer import LayerCall, layer


@dataclass(frozen=True)
class ArctanCall(Call):
    """``torch.atan``, which no table of trady names."""


class _Arctan(torch.autograd.Function):
    """``y = atan(x)`` has the derivative ``cos(y)^2``: the result is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool) -> Tensor:
        y = x.atan_() if in_place else x.atan()
        if in_place:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return gradients[0] * y.cos().square(), None


@dataclass
class Lean:
    """The kind under test, and what its handler has seen: the rows of each call, and its action."""

    rows: list[int] = field(default_factory=list)
    actions: list[Action | None] = field(default_factory=list)

    @property
    def kind(self) -> CallKind[ArctanCall]:
        return CallKind(
            ArctanCall,
            readers={torch.atan: lambda input: ArctanCall(input)},
            keeps=lambda call: Keeps.RESULT,
            handler=self._compute,
            samples=aligned,
        )

    def _compute(self, call: ArctanCall, handling: Handling) -> Tensor:
        overwrite = isinstance(handling.action, InPlace) and handling.action.overwrite
        if not call.x.is_meta:
            self.rows.append(len(call.x))
            self.actions.append(handling.action)
        if overwrite:
            handling.commit()
        with labelled("arctan"):
            out: Tensor = _Arctan.apply(call.x, overwrite)
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 64) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(64, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.atan(up(x)))
        out: Tensor = self.head(x)
        return out


@pytest.fixture
def lean() -> Lean:
    return Lean()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in place": {"overwrites_input": True},
    "without a rule": {"samples": None},
    "keeps nothing": {"keeps": lambda call: Keeps.NOTHING},
}


@pytest.fixture(params=VARIANTS)
def kind(request: pytest.FixtureRequest, lean: Lean) -> Iterator[CallKind[ArctanCall]]:
    made = replace(lean.kind, **VARIANTS[request.param])
    register(made)
    try:
        yield made
    finally:
        unregister(made)


def prepared(model: nn.Module, x: Tensor, recompute: str) -> trady.Tuner:
    return trady.prepare(
        model, x, budget="elements:100000000", policy="full", head="head", recompute=recompute, micro_batch=None
    )


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 5)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_registered_kind_is_computed_by_its_handler_with_the_dense_gradients(
    recompute: str, kind: CallKind[ArctanCall], lean: Lean, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trady.interception.deferred_segment._CHUNK_BYTES", 1)
    model, x = seeded(Blocks), normal(6, 8)
    expected_loss = loss_of(model, x)
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert not lean.rows  # nothing is intercepted in a model of PyTorch alone
    model.zero_grad()
    tuner = prepared(model, x, recompute)
    try:
        found = loss_of(model, x)
        found.backward()
        assert torch.allclose(found, expected_loss)
        gradients = dict(tuner.named_parameters())
        for place in range(3):
            for name in (f"up.{place}.weight", f"down.{place}.weight"):
                assert relative_error(gradients[f"{name}.channels"].grad, expected[name].t()) < 1e-5
        planned = [isinstance(action, InPlace) and action.overwrite for action in lean.actions]
        assert all(planned) if kind.overwrites_input else not any(planned)
        worthwhile = recompute == "all" and kind.keeps(ArctanCall(x)) is not Keeps.NOTHING
        if not worthwhile:
            assert lean.rows == [6] * 3
        elif kind.samples is None:  # nobody knows where the samples lie: forward and backward on the full batch
            assert lean.rows == [6] + [6] * 2 * 2
        else:  # no activation enters the first block, so that it is not recomputed
            assert lean.rows == [6] + [1] * 6 * 2 * 2
    finally:
        tuner.finish()


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_what_a_kind_keeps_is_accounted_to_it(kind: CallKind[ArctanCall]) -> None:
    model, x = seeded(Blocks), normal(6, 8)
    tuner = prepared(model, x, "none")
    try:
        saved = tuner.ledger(lambda: loss_of(model, x).backward()).saved
        assert sum(entry.bytes for entry in saved if entry.operation == "arctan") == 3 * 6 * 64 * 4
    finally:
        tuner.finish()


def test_a_kind_can_be_left_to_pytorch_again(lean: Lean) -> None:
    model, x = seeded(Blocks), normal(6, 8)
    kind = lean.kind
    register(kind)
    unregister(kind)
    tuner = prepared(model, x, "none")
    try:
        loss_of(model, x).backward()
    finally:
        tuner.finish()
    assert not lean.rows


def test_a_function_belongs_to_one_kind(lean: Lean) -> None:
    taken = replace(lean.kind, readers={F.relu: lambda input: ArctanCall(input)})
    with pytest.raises(ValueError, match=r"relu.*unregister"):
        register(taken)
    model, x = seeded(Blocks), normal(6, 8)
    prepared(model, x, "none").finish()
    assert not lean.rows  # refused, it has left nothing behind


def test_a_signature_that_a_kind_does_not_know_is_left_to_pytorch(lean: Lean) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.atan(self.first(x), out=None))
            return out

    register(lean.kind)
    try:
        model, x = seeded(Named), normal(6, 8)
        tuner = prepared(model, x, "none")
        loss_of(model, x).backward()
        tuner.finish()
    finally:
        unregister(lean.kind)
    assert not lean.rows


class Seen(CallMode):
    """Writes down what comes to :meth:`call` and :meth:`asked`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.questions: list[Any] = []

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(func)
        return func(*args, **kwargs)

    def asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.questions.append(func)
        return func(*args, **kwargs)


def test_a_mode_sees_calls_decomposed_canonical_and_apart_from_questions() -> None:
    attention, weight, x = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(normal(5, 8)), normal(2, 3, 8)
    expected, product = attention(x, x, x)[0], x @ weight.t()
    with Seen() as seen:
        assert torch.allclose(attention(x, x, x)[0], expected)
    assert F.multi_head_attention_forward not in seen.calls
    assert F.linear in seen.calls
    assert torch.Tensor.dim in seen.questions
    with Seen() as seen:
        found = x @ weight.t()
    assert torch.allclose(found, product)
    assert seen.calls == [F.linear]


def test_a_mode_that_remembers_no_transposes_sees_the_product() -> None:
    class Plain(Seen):
        remembers_transposes = False

    weight, x = nn.Parameter(normal(5, 8)), normal(3, 8)
    with Plain() as seen:
        x @ weight.t()
    assert len(seen.calls) == 2
    assert F.linear not in seen.calls


@dataclass(frozen=True)
class NegationCall(Call):
    """``torch.neg``, whose backward pass in PyTorch reads nothing; that of a handler may read the input."""


class Negated(nn.Module):
    """Behind the last layer of the first block nothing but additions and a negation follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.up = nn.ModuleList(nn.Linear(8, 64) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + torch.neg(down(torch.exp(0.1 * up(x))))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("keeps", [Keeps.INPUTS, Keeps.NOTHING])
def test_what_a_kind_keeps_has_values_when_it_is_recomputed(keeps: Keeps, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(Negated), normal(6, 8)
    without_values: list[bool] = []

    def observed(x: Tensor, leaf: Tensor | None, call: LayerCall, weight: Tensor, *others: Any) -> Tensor:
        if not x.is_meta and weight.data_ptr() == model.get_parameter("down.0.weight").data_ptr():
            without_values.append(call.graph_only)
        return layer(x, leaf, call, weight, *others)

    monkeypatch.setattr("trady.calls.kinds.weight.layer", observed)
    kind = CallKind(NegationCall, readers={torch.neg: lambda input: NegationCall(input)}, keeps=lambda call: keeps)
    register(kind)
    try:
        tuner = prepared(model, x, "all")
        loss_of(model, x).backward()
        tuner.finish()
    finally:
        unregister(kind)
    assert without_values == [False, keeps is Keeps.NOTHING]  # forward, and once more backward
