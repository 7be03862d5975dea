"""The tests themselves: short files, each a subject of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = sorted(Path(__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_file_is_longer_than_a_reader_wants(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_helpers_come_from_helper_files(path: Path) -> None:
    assert not re.findall(r"\btests\.test_\w+|from tests import .*\btest_", path.read_text(encoding="utf-8"))
