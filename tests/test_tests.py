"""The tests themselves: short files, each a subject of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trady
from tests.quick import QUICK

TESTS = sorted(Path(__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_file_is_longer_than_a_reader_wants(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_helpers_come_from_helper_files(path: Path) -> None:
    assert not re.findall(r"\btests\.test_\w+|from tests import .*\btest_", path.read_text(encoding="utf-8"))


def test_the_quick_tests_look_at_every_package() -> None:
    packages = {path.parent.name for path in Path(trady.__file__).parent.glob("*/__init__.py")}
    assert packages == set(QUICK)
    for package, selected in QUICK.items():
        files = [(Path(__file__).parent / test.split("::")[0]).read_text(encoding="utf-8") for test in selected]
        assert any(f"trady.{package}" in text for text in files), package
