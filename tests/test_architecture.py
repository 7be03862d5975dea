"""The house keeps its form: who imports whom, what lies at the root, who reads the environment, how long a file is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trady
from tests import import_contract as contract

TRADY = Path(trady.__file__).parent
PAGE = TRADY.parent / "docs" / "architecture.md"


def test_no_package_imports_one_above_it() -> None:
    assert not contract.upward_imports(TRADY)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not contract.import_cycles(TRADY)


def test_only_the_public_face_lies_at_the_root() -> None:
    assert not contract.loose_files(TRADY)


def test_every_package_says_what_it_is() -> None:
    assert not contract.packages_without_docstring(TRADY)


def test_every_package_is_in_the_table_and_the_table_has_no_others() -> None:
    folders = {path.parent.name for path in TRADY.glob("*/__init__.py")}
    assert folders | {"errors"} == set(contract.MAY_IMPORT)


def test_only_those_named_touch_the_environment() -> None:
    assert not contract.environment_reads(TRADY)


def test_those_named_do_touch_the_environment() -> None:
    """A permission that nobody uses any more goes."""
    users = [name for name in contract.ENVIRONMENT if name != "cli"]
    assert [name for name in users if not contract.environment_reads(TRADY, set(users) - {name})] == []


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    assert contract.long_files(TRADY) == {}


def test_the_page_shows_the_table_that_is_tested() -> None:
    shown = {}
    for names, may in re.findall(r"^\| (`[^|]+`) \|[^|]+\| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.M):
        shown.update({name.strip("`"): may.replace("`", "") for name in names.split(", ")})
    assert shown == dict(contract.MAY_IMPORT)


# The checks themselves, on a small tree that breaks each rule


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Three packages, one on top of the other, and nothing wrong with them."""
    root = tmp_path / "trady"
    for name, text in {
        "__init__.py": '"""The face."""\nfrom trady.tuner.tuner import Tuner\n',
        "errors.py": '"""Errors."""\n',
        "channels/__init__.py": '"""Channels."""\n',
        "channels/table.py": "import os\nfrom trady.errors import TradyError\nPLACE = os.sep\n",
        "ranking/__init__.py": '"""Ranking."""\n',
        "ranking/scores.py": "from trady.channels.table import PLACE\n",
        "tuner/__init__.py": '"""The session."""\n',
        "tuner/tuner.py": "from trady.ranking import scores\nclass Tuner: ...\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


TABLE = {"errors": "–", "channels": "errors", "ranking": "channels", "tuner": "ranking and below"}


def add(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


def test_a_house_in_order_passes(house: Path) -> None:
    assert contract.upward_imports(house, TABLE) == []
    assert contract.import_cycles(house) == []
    assert contract.environment_reads(house) == []
    assert contract.loose_files(house) == []
    assert contract.packages_without_docstring(house) == []
    assert contract.long_files(house) == {}


@pytest.mark.parametrize(
    "line",
    [
        "from trady.tuner.tuner import Tuner",
        "import trady.tuner.tuner",
        "from trady.tuner import tuner",
        "from ..tuner import tuner",
        "from ..tuner.tuner import Tuner",
        "def late():\n    from trady.tuner.tuner import Tuner",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trady.tuner.tuner import Tuner",
    ],
)
def test_an_import_upwards_is_found_wherever_it_stands(house: Path, line: str) -> None:
    add(house / "ranking" / "scores.py", line)
    (problem,) = contract.upward_imports(house, TABLE)
    assert "ranking/scores.py" in problem
    assert "imports tuner" in problem
    assert "ranking may import: channels, errors" in problem


@pytest.mark.parametrize("line", ["import trady", "from trady import Tuner", "from .. import Tuner"])
def test_the_public_face_is_above_everything(house: Path, line: str) -> None:
    add(house / "ranking" / "scores.py", line)
    (problem,) = contract.upward_imports(house, TABLE)
    assert "ranking.scores imports trady" in problem


def test_a_sideways_import_and_a_package_outside_the_table_are_found(house: Path) -> None:
    add(house / "channels" / "table.py", "import trady.ranking.scores")
    (house / "attic").mkdir()
    (house / "attic" / "__init__.py").write_text("import trady.errors\n")
    sideways, attic = sorted(contract.upward_imports(house, TABLE), reverse=True)
    assert "channels.table imports ranking.scores" in sideways
    assert "attic is not in the table" in attic


def test_a_circle_of_files_is_found_and_a_late_import_is_none(house: Path) -> None:
    add(house / "ranking" / "scores.py", "from trady.ranking.online import learn")
    (house / "ranking" / "online.py").write_text("def learn():\n    from trady.ranking import scores\n")
    assert contract.import_cycles(house) == []
    (house / "ranking" / "online.py").write_text("if True:\n    from trady.ranking import scores\n")
    assert contract.import_cycles(house) == [["ranking.online", "ranking.scores"]]


@pytest.mark.parametrize(
    "line",
    [
        "import os\nX = os.environ['X']",
        "import os\nX = os.getenv('X')",
        "from os import environ",
        "import os\nos.environ['X'] = ''",
    ],
)
def test_a_use_of_the_environment_is_found(house: Path, line: str) -> None:
    add(house / "ranking" / "scores.py", line)
    (problem,) = contract.environment_reads(house, ("ranking.priors", "channels"))
    assert "ranking.scores uses os." in problem
    assert contract.environment_reads(house, ("ranking.scores",)) == []


def test_a_loose_file_a_silent_package_and_a_long_file_are_found(house: Path) -> None:
    (house / "helpers.py").write_text("X = 1\n" * 7)
    (house / "ranking" / "__init__.py").write_text("")
    assert contract.loose_files(house) == ["helpers.py"]
    assert contract.packages_without_docstring(house) == ["trady/ranking"]
    assert contract.long_files(house, 7) == {"trady/helpers.py": 7}


def test_a_table_that_points_upwards_is_refused() -> None:
    with pytest.raises(ValueError, match="channels is listed below tuner"):
        contract.allowed({"errors": "–", "channels": "tuner", "tuner": "errors"})
