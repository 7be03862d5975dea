"""Recurrent layers of PyTorch train by channel, whatever the length of the sequences, and a plan knows their peak."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import trady
from tests.against_dense import assert_dense_gradients, dense_gradients, gradients
from tests.models import gradient_of, normal, seeded
from tests.tight_budget import least_of, peaks_in_a_tight_budget, predicted_peak
from trady.calls.recurrent import RECURRENT
from trady.ops.recurrent.recurrence import recurrence
from trady.ops.recurrent.steps import Steps

Batch = tuple[Tensor, ...]


class Reader(nn.Module):
    """A recurrent layer between two linear ones; all that it returns is read."""

    def __init__(self, cell: Any, features: int = 6, hidden: int = 5, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, features)
        self.cell = cell(features, hidden, **options)
        width = (self.cell.proj_size or hidden) * (2 if self.cell.bidirectional else 1)
        self.middle, self.head = nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        start = None if not states else states[0] if len(states) == 1 else states
        out, ends = self.cell(torch.tanh(self.embed(x)), start)
        scores = self.head(torch.relu(self.middle(out)))
        return (scores, *(ends if isinstance(ends, tuple) else (ends,)))


class Stepper(nn.Module):
    """A cell that the model itself calls once a step."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.head = cell(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return (self.head(state[0] if isinstance(state, tuple) else state),)


def batch(*shape: int, states: tuple[tuple[int, ...], ...] = ()) -> Batch:
    return tuple(normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate((shape, *states)))


CASES: dict[str, tuple[Any, Batch]] = {
    "LSTM": (lambda: Reader(nn.LSTM, batch_first=True), batch(3, 7, 4)),
    "GRU": (lambda: Reader(nn.GRU, batch_first=True), batch(3, 7, 4)),
    "RNN": (lambda: Reader(nn.RNN, batch_first=True), batch(3, 7, 4)),
    "RNN, relu": (lambda: Reader(nn.RNN, batch_first=True, nonlinearity="relu"), batch(3, 7, 4)),
    "LSTM, sequence first": (lambda: Reader(nn.LSTM), batch(7, 3, 4)),
    "GRU, one sequence without a batch": (lambda: Reader(nn.GRU), batch(7, 4)),
    "LSTM, both directions, two layers": (
        lambda: Reader(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2),
        batch(3, 7, 4),
    ),
    "GRU, both directions, two layers, no bias": (
        lambda: Reader(nn.GRU, batch_first=True, bidirectional=True, num_layers=2, bias=False),
        batch(3, 7, 4),
    ),
    "LSTM, projections, first states": (
        lambda: Reader(nn.LSTM, batch_first=True, proj_size=3, num_layers=2),
        batch(3, 7, 4, states=((2, 3, 3), (2, 3, 5))),
    ),
    "GRU, first state": (lambda: Reader(nn.GRU, batch_first=True), batch(3, 7, 4, states=((1, 3, 5),))),
    "LSTM cell": (lambda: Stepper(nn.LSTMCell), batch(3, 5, 4)),
    "GRU cell": (lambda: Stepper(nn.GRUCell), batch(3, 5, 4)),
    "RNN cell": (lambda: Stepper(nn.RNNCell), batch(3, 5, 4)),
}


def loss_on(inputs: Batch) -> Any:
    return lambda model: sum(out.square().sum() for out in model(*inputs))


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_recurrent_layers_train_by_channel(name: str, train: bool, recompute: str) -> None:
    build, inputs = CASES[name]
    model = seeded(build).double()
    plain = copy.deepcopy(model)
    tuner = trady.prepare(model, inputs, budget="elements:150", policy="dynamic-random", recompute=recompute)
    model.train(train)
    weights = [n for n, p in model.named_parameters() if "weight_ih" in n or "weight_hh" in n]
    assert weights
    assert set(weights) <= {layer.parameter for layer in tuner.plan.table}
    for out, expected in zip(model(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    for epoch in range(2):
        tuner.resample(epoch)
        assert any("cell.weight" in layer for layer in tuner.selection)
        assert_dense_gradients(model, tuner, loss_on(inputs))
    tuner.finish()


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("LSTM", "none"),
        ("LSTM", "all"),
        ("GRU, both directions, two layers, no bias", "none"),
        ("GRU, both directions, two layers, no bias", "all"),
        ("LSTM cell", "none"),
    ],
)
def test_sequences_of_other_lengths_than_the_example(name: str, recompute: str) -> None:
    build, inputs = CASES[name]
    model = seeded(build).double()
    tuner = trady.prepare(model, inputs, policy="full", recompute=recompute)
    for samples, length in ((3, 7), (2, 11), (5, 1), (3, 7), (1, 3)):
        assert_dense_gradients(model, tuner, loss_on(batch(samples, length, 4)))
    tuner.finish()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_in_other_words(cell: str, bidirectional: bool) -> None:
    """Every weight, input and first state gets PyTorch's own gradient."""
    kinds: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
    options: dict[str, Any] = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    if cell == "lstm":
        options = {"proj_size": 3}
    module: nn.RNNBase = seeded(
        lambda: kinds[cell](4, 5, num_layers=2, bidirectional=bidirectional, **options)
    ).double()
    x = normal(3, 6, 4, dtype=torch.float64).requires_grad_()
    first = normal(4 if bidirectional else 2, 3, module.proj_size or 5, dtype=torch.float64).requires_grad_()
    states: Any = (first, first.new_ones((first.shape[0], 3, 5)).requires_grad_()) if cell == "lstm" else first
    function = getattr(torch, cell)
    wanted = [x, *(states if cell == "lstm" else (first,)), *module.parameters()]
    results = []
    for run in (function, RECURRENT[function]):
        packed = pack_padded_sequence(x, torch.tensor([6, 4, 2]), batch_first=True)
        weights = module._flat_weights, True, 2, 0.0, True, bidirectional
        made = run(packed.data, packed.batch_sizes, states, *weights)
        loss = sum(out.sin().sum() for out in made)
        results.append((*made, *torch.autograd.grad(loss, wanted)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_many_steps_are_differentiated_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.ops.recurrent.steps.CHUNK_BYTES", 1024)
    gates = normal(3, 9, 20, dtype=torch.float64)
    assert len(Steps("lstm", 1).blocks(gates)) > 3
    for reverse in (False, True):
        steps = Steps("lstm", 1, reverse)
        states = [normal(3, 5, seed=i, dtype=torch.float64) for i in (1, 2)]
        weight = normal(20, 5, seed=3, dtype=torch.float64)
        inputs = [t.clone().requires_grad_() for t in (gates, *states, weight)]

        def run(gates: Tensor, h: Tensor, c: Tensor, weight: Tensor, steps: Steps = steps) -> tuple[Tensor, ...]:
            return recurrence(gates, [h, c], weight, None, None, steps)

        assert torch.autograd.gradcheck(run, inputs)


def test_dropout_between_layers_is_that_of_the_mode() -> None:
    model = seeded(lambda: Reader(nn.GRU, batch_first=True, num_layers=2, dropout=0.5))
    x = normal(8, 12, 4)
    plain = copy.deepcopy(model).eval()
    tuner = trady.prepare(model, x, policy="full")
    model.train()
    first, second = model(x)[0], model(x)[0]
    assert not torch.equal(first, second)
    first.square().sum().backward()
    model.eval()
    torch.testing.assert_close(model(x)[0], plain(x)[0])
    tuner.finish()


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_computes_the_steps_in_bfloat16(cell: Any, recompute: str) -> None:
    model, x = seeded(lambda: Reader(cell, batch_first=True, hidden=16)), normal(4, 9, 4)
    tuner = trady.prepare(model, x, policy="full", recompute=recompute)
    expected = dense_gradients(model, tuner, loss_on((x,)))
    with torch.autocast("cpu", torch.bfloat16):
        outs = model(x)
        loss = sum(out.float().square().sum() for out in outs)
    if recompute == "none":  # what a segment hands to somebody who holds it has its own type
        assert all(out.dtype == torch.bfloat16 for out in outs)
    loss.backward()
    for name, gradient in gradients(tuner).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-3, name
    tuner.finish()


@pytest.mark.parametrize("recompute", ["auto", "none"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {}), (nn.LSTM, {"num_layers": 2, "bidirectional": True})],
    ids=["LSTM", "GRU", "RNN", "LSTM, both directions, two layers"],
)
def test_a_peak_budget_is_kept_as_predicted(cell: Any, options: dict[str, Any], recompute: str) -> None:
    def build() -> nn.Module:
        return seeded(lambda: Reader(cell, 32, 48, batch_first=True, **options))

    x = normal(16, 40, 4)
    settings: dict[str, Any] = {"policy": "dynamic-random", "recompute": recompute}
    limit = int(1.1 * least_of(lambda: trady.prepare(build(), x, budget="peak:1 B", **settings)))
    model = build()
    tuner = trady.prepare(model, x, budget=f"peak:{limit} B", **settings)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=1e-4))

    def step() -> None:
        loss = torch.stack([torch.log_softmax(out, -1).mean() for out in model(x)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = tuner.ledger(step, inference=False).peak_bytes
    assert peak <= limit
    assert abs(predicted_peak(tuner.plan) / peak - 1) < 0.03
    tuner.finish()


def test_a_trained_lstm_goes_through_state_and_delta() -> None:
    def build() -> nn.Module:
        return seeded(lambda: Reader(nn.LSTM, batch_first=True))

    model, base, x = build(), build(), normal(3, 7, 4)
    tuner = trady.prepare(model, x, policy="full")
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.1))
    loss_on((x,))(model).backward()
    optimizer.step()
    state, delta = tuner.state_dict(), tuner.delta()
    assert {"cell.weight_ih_l0", "cell.weight_hh_l0"} <= set(tuner.selection)
    assert all(any(name.startswith(layer) for name in delta) for layer in ("cell.weight_ih_l0", "cell.weight_hh_l0"))
    again = trady.prepare(build(), x, policy="full")
    again.load_state_dict(state)
    trained = tuner.finish()
    for network in (again.finish(), trady.apply_delta(base, delta)):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, trained.state_dict()[name]), name
    assert not torch.equal(trained.get_parameter("cell.weight_hh_l0"), build().get_parameter("cell.weight_hh_l0"))


def test_a_recurrent_layer_in_the_head_trains_as_a_whole() -> None:
    model, x = seeded(lambda: Reader(nn.LSTM, batch_first=True, proj_size=3)).double(), batch(3, 7, 4)
    tuner = trady.prepare(model, x, policy="full", head=["cell", "head"])
    assert "cell.weight_hr_l0" in dict(tuner.named_parameters())
    assert_dense_gradients(model, tuner, loss_on(x))
    tuner.finish()


def test_a_model_that_ends_in_a_recurrent_layer_has_no_head() -> None:
    model, x = seeded(lambda: nn.LSTM(4, 5, batch_first=True)).double(), batch(3, 7, 4)
    tuner = trady.prepare(model, x, policy="full")
    assert not tuner.plan.head
    assert tuner.plan.table.names == ("weight_ih_l0", "weight_hh_l0")
    loss = lambda model: model(*x)[0].square().sum()  # noqa: E731
    assert_dense_gradients(model, tuner, loss)
    tuner.finish()


class Packed(nn.Module):
    """Sentences of different lengths, packed by the model as PyTorch's tutorials do."""

    def __init__(self, cell: Any, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.embed = batch_first, nn.Embedding(20, 6)
        self.cell = cell(6, 8, num_layers=2, batch_first=batch_first, bidirectional=True)
        self.middle, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(ids if self.batch_first else ids.t())
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=self.batch_first, enforce_sorted=False)
        options: dict[str, Any] = {"batch_first": self.batch_first, "padding_value": 0.5, "total_length": ids.shape[1]}
        x, found = pad_packed_sequence(self.cell(packed)[0], **options)
        x = torch.tanh(self.middle(x if self.batch_first else x.transpose(0, 1)))
        return self.head(x.sum(1) / found[:, None])


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_sentences_that_the_model_packs(cell: type[nn.RNNBase], batch_first: bool, recompute: str) -> None:
    """Also other lengths and fewer sentences than in the example."""
    model = seeded(lambda: Packed(cell, batch_first=batch_first)).double()
    ids, lengths = torch.arange(36).view(4, 9) % 20, torch.tensor([5, 9, 3, 7])
    tuner = trady.prepare(model, (ids, lengths), policy="full", recompute=recompute)
    assert len(tuner.plan.table) == 9
    for inputs in ((ids, lengths), (ids[:3, :6], torch.tensor([6, 2, 4]))):
        loss = lambda model: model(*inputs).square().sum()  # noqa: E731, B023
        assert_dense_gradients(model, tuner, loss)
    with pytest.raises(RuntimeError, match=r"those of 4 sequences, longest first, of 1 to 9 steps"):
        model(ids, torch.tensor([5, 10, 3, 7]))
    tuner.finish()


def test_the_peak_of_packed_sentences_is_known() -> None:
    model = seeded(lambda: Packed(nn.LSTM, batch_first=True))
    sentences = {"ids": torch.arange(32 * 27).view(32, 27) % 20, "lengths": torch.tensor([15, 27, 9, 21]).repeat(8)}
    limit, peak, predicted = peaks_in_a_tight_budget(
        model, sentences, lambda scores: torch.log_softmax(scores, -1).mean()
    )
    assert peak <= limit
    assert abs(predicted / peak - 1) < 0.01


def test_a_projection_is_frozen_with_a_reason() -> None:
    plan = trady.plan(Reader(nn.LSTM, batch_first=True, proj_size=3), normal(3, 7, 4), policy="full")
    reasons = {frozen.parameter: frozen.reason for frozen in plan.table.frozen}
    assert "recurrence" in reasons["cell.weight_hr_l0"]


def test_neurons_of_a_recurrent_layer_are_watched() -> None:
    """The policy that looks at what neurons compute finds those of the hidden products too."""
    model, x = seeded(lambda: Reader(nn.GRU, batch_first=True)), normal(3, 7, 4)
    tuner = trady.prepare(model, x, budget="elements:200", policy="velocity")
    for epoch in range(2):
        tuner.observe([(x, torch.zeros(3))], lambda outs, target: sum(out.square().mean() for out in outs))
        tuner.resample(epoch)
        loss_on((x,))(model).backward()
    assert "cell.weight_hh_l0" in {layer.parameter for layer in tuner.plan.table}
    assert len(tuner.selection)
    tuner.finish()


def test_gates_of_hidden_states_get_the_gradient_of_every_sample() -> None:
    """What Fisher information is made of: the factor of a channel has the gradient ``Σ W dL/dW`` of its sample."""
    model, (x,) = seeded(lambda: Reader(nn.LSTM, batch_first=True)).double(), batch(3, 7, 4)
    tuner = trady.prepare(model, x, policy="full", recompute="none")
    with tuner._armed.gated(3) as gates:
        loss_on((x,))(model).backward()
        found = gradient_of(gates["cell.weight_hh_l0"])
    plain = tuner.finish().requires_grad_(True)
    for number, sample in enumerate(x.split(1)):
        plain.zero_grad()
        loss_on((sample,))(plain).backward()
        weight = plain.get_parameter("cell.weight_hh_l0")
        torch.testing.assert_close(
            found[:, number], (weight.detach() * gradient_of(weight)).sum(0), rtol=1e-9, atol=1e-11
        )
