"""The public face is frozen: a name, signature, flag or key that comes, goes or changes is changed on purpose."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests import public_face


@pytest.fixture(scope="module")
def agreed() -> dict[str, Any]:
    face: dict[str, Any] = json.loads(public_face.SNAPSHOT.read_text(encoding="utf-8"))
    return face


def test_the_public_face_is_the_agreed_one(agreed: dict[str, Any]) -> None:
    found = public_face.differences(public_face.as_text(agreed), public_face.as_text(public_face.public_face()))
    if found:
        pytest.fail(
            "The public face has changed (- agreed, + present):\n  "
            + "\n  ".join(found)
            + f"\nIs it meant? Then {public_face.UPDATE}, and say so in CHANGELOG.md.",
            pytrace=False,
        )


def test_a_difference_is_named_with_the_thing_that_it_belongs_to(agreed: dict[str, Any]) -> None:
    changed = copy.deepcopy(agreed)
    changed["command line"]["plan"]["--colour"] = changed["command line"]["plan"].pop("--curve")
    changed["python"]["trady.Tuner"]["redraw"] = "(self, twice: 'bool') -> 'Selection'"
    del changed["files"]["result.json"]["best_epoch"]
    changed["policies"].append("guess")
    found = public_face.differences(public_face.as_text(agreed), public_face.as_text(changed))
    assert sorted(found) == [
        "+ command line, plan: \"--colour\": \"bool, default False\"",
        "+ policies: \"guess\"",
        "+ python, trady.Tuner: \"redraw\": \"(self, twice: 'bool') -> 'Selection'\"",
        "- command line, plan: \"--curve\": \"bool, default False\"",
        "- files, result.json: \"best_epoch\": \"value\"",
        "- python, trady.Tuner: \"redraw\": \"(self) -> 'Selection'\"",
    ]  # fmt: skip


def test_no_difference_where_there_is_none(agreed: dict[str, Any]) -> None:
    assert public_face.differences(public_face.as_text(agreed), public_face.as_text(copy.deepcopy(agreed))) == []
