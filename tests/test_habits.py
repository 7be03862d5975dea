"""Training code as people write it: every row of ``benchmarks.habits`` is what it says, and rows can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.habits import ROWS, Row, try_row
from benchmarks.habits.__main__ import run
from benchmarks.habits.networks import X, convolutions, images, loss_of, perceptron, sgd, train
from benchmarks.habits.row import Side
from trady.errors import BudgetError


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.:DeprecationWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.idiom)
def test_a_row_is_what_it_says(row: Row) -> None:
    found = try_row(row)
    assert found.right, found


def test_rows_have_names_of_their_own() -> None:
    names = [row.idiom for row in ROWS]
    assert len(names) == len(set(names)) >= 60
    assert {row.expected for row in ROWS} <= {"equal", "kept", "refused"}


def _trains(side: Side, lr: float, steps: int = 2) -> None:
    model = perceptron()
    tuner = side.prepare(model, X)
    train(model, tuner.attach(sgd(model.parameters(), side.pick(lr, 0.1))), steps)


def _skips_the_channels(side: Side) -> None:
    model = perceptron()
    side.prepare(model, X)
    train(model, sgd(side.pick(model[-1:], model).parameters()))


def _raises(side: Side) -> None:
    side.prepare(perceptron(), X)
    raise ValueError("what PyTorch says")


def _refuses(side: Side) -> None:
    raise BudgetError("this is too much")


def _exceeds(side: Side) -> None:
    model = convolutions()
    tuner = side.prepare(model, images(), over=1.1, over_budget="warn")
    optimizer = tuner.attach(sgd(model.parameters()))
    side.step(lambda: train(model, optimizer, 1, images(16), torch.arange(16) % 3))


@pytest.mark.parametrize(
    ("row", "happened"),
    [
        (Row("another rate", lambda side: _trains(side, 0.1001)), "differs: 0."),
        (Row("no step", lambda side: _trains(side, 0.1, 0)), "no channel of model 0 trains"),
        (Row("only the head", _skips_the_channels), "differs: 0."),
        (Row("an error that is not ours", _raises, "refused", "."), "ValueError: what PyTorch says"),
        (Row("an unexpected refusal", _refuses), "refused: this is too much"),
        (Row("other words", _refuses, "refused", "too little"), "refused: this is too much"),
        (Row("nothing was refused", lambda side: _trains(side, 0.1), "refused", "."), "equal"),
        (Row("no warning", lambda side: _trains(side, 0.1), "equal", "is not covered"), "nobody was told"),
    ],
    ids=lambda value: value.idiom if isinstance(value, Row) else "",
)
def test_a_row_that_is_not_what_it_says_is_wrong(row: Row, happened: str) -> None:
    found = try_row(row)
    assert not found.right
    assert found.happened.startswith(happened)


def test_a_budget_that_is_exceeded_is_wrong_whatever_the_weights_are() -> None:
    found = try_row(Row("a larger batch that was warned of", _exceeds, "kept"))
    assert found.happened == "kept"
    assert found.budget_bytes is not None
    assert found.peak_bytes is not None
    assert found.peak_bytes > found.budget_bytes
    assert not found.right


def test_the_command_shows_rows_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "habits.json"
    assert run(["--only", "Lookahead", "jit.script", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["outcomes"]
    assert [row["expected"] for row in rows] == ["equal", "refused"]
    assert rows[0]["error"] < 1e-6
    assert "2 rows, 0 with a measured budget, 0 not as expected" in capsys.readouterr().out


def test_the_command_fails_where_a_row_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Row("another rate", lambda side: _trains(side, 0.2))
    monkeypatch.setattr("benchmarks.habits.__main__.ROWS", (wrong,))
    assert run([]) == 1


def test_gradients_of_a_row_can_be_compared_as_well() -> None:
    def program(side: Side) -> None:
        model = perceptron()
        tuner = side.prepare(model, X)
        optimizer = tuner.attach(sgd(model.parameters()))
        loss_of(model).backward()
        side.result("loss", F.cross_entropy(model(X), torch.arange(16) % 3) + side.pick(1e-3, 0.0))
        optimizer.step()

    assert try_row(Row("another loss", program)).happened == "differs: loss"
