"""Order is never an accident: what several processes do together comes in the same order in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.iteration import loops_over_sets

ROOT = Path(__file__).parents[1] / "trady"


def test_nothing_loops_over_a_set() -> None:
    assert [str(loop) for loop in loops_over_sets(ROOT)] == []


@pytest.mark.parametrize(
    "code",
    [
        "for x in {id(a), id(b)}: use(x)",
        "def f(xs):\n    found = {id(x) for x in xs}\n    return {i: find(i) for i in found}",
        "def f(xs: set[int]):\n    return list(xs)",
        "def f(a, b):\n    left = set(a)\n    return [x for x in left - b]",
        "class C:\n    def __init__(self):\n        self.known: set[int] = set()\n    def f(self):\n"
        "        return [*self.known]",
        "first = next(iter(frozenset(given)))",
    ],
)
def test_a_loop_over_a_set_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "some.py").write_text(code)
    assert len(loops_over_sets(tmp_path)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "for x in sorted({id(a), id(b)}): use(x)",
        "def f(xs):\n    found = {id(x) for x in xs}\n    return all(known(i) for i in found)",
        "def f(xs):\n    found = dict.fromkeys(id(x) for x in xs)\n    return list(found)",
        "def f(xs):\n    xs = set(xs)\n    return {x + 1 for x in xs}",
        "def f(xs):\n    return [x for x in xs if x in {1, 2}]",
    ],
)
def test_a_set_whose_order_nobody_sees_is_none(tmp_path: Path, code: str) -> None:
    (tmp_path / "some.py").write_text(code)
    assert loops_over_sets(tmp_path) == []
