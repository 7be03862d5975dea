"""Every record with a header refuses the same things in the same words, each with an error of its own class."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trady.errors import CheckpointError, PolicyError, RankingError, StateError, TradyError
from trady.memory import Ledger
from trady.planning.plan import Plan
from trady.policies.schemes import Scheme
from trady.ranking.ranking import LayerRanking
from trady.records.versioned import Format
from trady.study.folder import StudyFolder
from trady.training.checkpoint import load_checkpoint

FILES = Path(__file__).parent / "fixtures" / "e38e0df"

#: The file that holds a record, what reads it, its error, its name, an entry that it needs, and the remedy.
RECORDS: list[tuple[str, Callable[[Path], Any], type[TradyError], str, str, str]] = [
    ("plan.json", Plan.load, CheckpointError, "plan", "layers", "trady.plan"),
    ("ranking.json", LayerRanking.load, RankingError, "layer ranking", "scores", "trady rank"),
    ("ledger.json", Ledger.load, TradyError, "ledger", "saved", "measure again"),
    ("scheme.json", Scheme.load, PolicyError, "scheme", "channel_ratios", "trady search"),
    (
        "run/checkpoint/checkpoint.json",
        lambda path: load_checkpoint(path.parent),
        CheckpointError,
        "checkpoint",
        "epoch",
        "--overwrite",
    ),
    (
        "study/settings.json",
        lambda path: StudyFolder(path.parent).load_settings(),
        StateError,
        "study",
        "epochs",
        "record it again",
    ),
]


@pytest.fixture(params=RECORDS, ids=[record[0] for record in RECORDS])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, ...]:
    name, *rest = request.param
    path = tmp_path / Path(name).name
    for file in (FILES / name).parent.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if name == "ranking.json":  # the score is another since; tests/test_old_formats.py has the old file
        LayerRanking({"first": 2.0, "second": 1.0}).save(path)
    return path, *rest


def refusal(record: tuple[Any, ...], change: Callable[[dict[str, Any]], Any]) -> str:
    """Return what the reader says of the changed record; the error is of the record's own class."""
    path, load, error, *_ = record
    load(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(error) as refused:
        load(path)
    assert type(refused.value) is error
    return str(refused.value)


def test_something_else_is_refused_with_its_format(record: tuple[Any, ...]) -> None:
    said = refusal(record, lambda data: {**data, "format": "recipe"})
    assert f"this is no {record[3]} (its format is 'recipe', not 'trady" in said
    assert record[0].name in said or str(record[0].parent) in said


def test_another_version_is_refused_with_the_remedy(record: tuple[Any, ...]) -> None:
    if record[3] == "ledger":  # its version is part of the name of its format
        assert "'trady ledger 2', not 'trady ledger 1'" in refusal(record, lambda d: {**d, "format": "trady ledger 2"})
        return
    said = refusal(record, lambda data: {**data, "version": 9})
    assert re.search(
        rf"the {record[3]} is of version \d, this trady reads version \d.*: use the trady that wrote it, or ", said
    )
    assert record[5] in said


def test_a_missing_entry_is_damage(record: tuple[Any, ...]) -> None:
    said = refusal(record, lambda data: {key: value for key, value in data.items() if key != record[4]})
    assert record[4] in said
    assert record[5] in said


def test_a_file_that_is_cut_short_or_absent_is_refused(record: tuple[Any, ...]) -> None:
    path, load, error, noun, _, remedy = record
    path.write_text(path.read_text()[:-5])
    with pytest.raises(error, match=f"is no {noun}, or is cut short .*{remedy}"):
        load(path)
    path.unlink()
    with pytest.raises(error, match=r"cannot read|is missing"):
        load(path)


def test_what_goes_wrong_inside_an_entry_becomes_the_records_own_error() -> None:
    recipe = Format("recipe", "recipe", StateError, "cook again")
    said = r"the recipe is damaged \(PolicyError: no salt\); cook again"
    with pytest.raises(StateError, match=said), recipe.reading():
        raise PolicyError("no salt")
    with pytest.raises(StateError, match=r"no pepper$"), recipe.reading():
        raise StateError("no pepper")
    assert recipe.header() == {"format": "recipe", "version": 1}
    assert recipe.check({**recipe.header(), "salt": 1})["salt"] == 1
