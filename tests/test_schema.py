"""A dataclass's types are the schema of its record: what is something else is refused, with its place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trady
from trady.records.schema import MismatchError, Natural, Positive, read


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Leaf:
    sizes: tuple[int, ...]
    share: float = 0.5


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...]
    age: Natural | None
    kind: Literal["oak", "fir"] = "oak"
    colour: Colour = Colour.RED
    notes: Mapping[str, Any] = field(default_factory=dict)
    dead: bool = False
    rings: Positive = 1


GOOD: dict[str, Any] = {"name": "t", "leaves": [{"sizes": [1, 2]}], "age": None}


def test_what_fits_is_read_and_defaults_stand_in() -> None:
    expected = Tree("t", (Leaf((1, 2)), Leaf((), 1.0)), 3, "fir", Colour.BLUE, {"a": [1, {"b": None}]})
    leaves = [{"sizes": [1, 2]}, {"sizes": [], "share": 1}]
    given = {**GOOD, "leaves": leaves, "age": 3, "kind": "fir", "colour": "blue", "notes": {"a": [1, {"b": None}]}}
    assert read(Tree, {**given, "of a later version": 1}) == expected
    assert type(read(Tree, given).leaves[1].share) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name is 1, not a text"),
        ({"name": "\ud800"}, "name holds half a character"),
        ({"leaves": {}}, "leaves is an object, not a list"),
        ({"leaves": [{"sizes": [1]}, 3]}, r"leaves[1] is 3, not an object"),
        ({"leaves": [{"sizes": [1, "2"]}]}, r"leaves[0].sizes[1] is '2', not a whole number"),
        ({"leaves": [{"sizes": [True]}]}, r"leaves[0].sizes[0] is true, not a whole number"),
        ({"leaves": [{"sizes": [1.0]}]}, r"leaves[0].sizes[0] is 1.0, not a whole number"),
        ({"leaves": [{"sizes": [2**63]}]}, "does not fit in 64 bits"),
        ({"leaves": [{}]}, r"leaves[0] lacks 'sizes'"),
        ({"leaves": [{"sizes": [], "share": float("nan")}]}, "share is nan, not a finite number"),
        ({"leaves": [{"sizes": [], "share": 10**400}]}, "does not fit in 64 bits"),
        ({"age": -1}, "age is -1; the smallest possible is 0"),
        ({"rings": 0}, "rings is 0; the smallest possible is 1"),
        ({"age": "x"}, "age is 'x', not a whole number"),
        ({"kind": "elm"}, "kind is 'elm'; possible are 'oak', 'fir'"),
        ({"kind": ["oak"]}, "kind is a list"),
        ({"colour": "green"}, "colour is 'green'"),
        ({"dead": 0}, "dead is 0, not true or false"),
        ({"notes": {"\udfff": 1}}, "half a character"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(message)):
        read(Tree, {**GOOD, **change})


def test_free_form_entries_are_not_nested_without_end() -> None:
    deep: Any = 0
    for _ in range(40):
        deep = [deep]
    with pytest.raises(MismatchError, match="nested more than 32 deep"):
        read(Tree, {**GOOD, "notes": {"deep": deep}})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted([*GOOD, "notes", "kind"])), value=anything)
def test_nothing_but_a_mismatch_is_raised(key: str, value: Any) -> None:
    with contextlib.suppress(MismatchError):
        assert isinstance(read(Tree, {**GOOD, key: value}), Tree)


# -- files are opened in few places --------------------------------------------------------------------------------

OPENS = re.compile(
    r"json\.loads?\(|np\.load\(|torch\.load\(|load_file\(|safe_open\(|tomllib\.loads?\(|\.read_text\(|\.read_bytes\("
    r"|(?<![\w.])open\(|[^o]\.open\((?!self)|ParquetFile\(|read_table\(|pickle"
)

#: Who opens a file by itself, and why it may.
ALLOWED = {
    "records/reading.py": "the seam: bytes of regular files, up to a size",
    "records/versioned.py": "the seam: JSON and safetensors",
    "records/tensors.py": "writes safetensors, and reads nothing",
    "training/checkpoint.py": "a digest of what the seam reads next, and of its own JSON",
    "training/run_folder.py": "which epoch its best weights are of and which weights are tied, in their headers",
    "training/data/archive.py": ".npz, size by size",
    "training/data/fashion_mnist.py": "gzip, up to a size",
    "training/data/npz.py": "says that nothing is pickled",
    "training/data/image_files.py": "Pillow, of bytes that the seam has read",
    "training/texts/tables.py": "tables, read by datasets; lines of bytes that the seam has read",
    "training/models/transformers_files.py": "copies what transformers has just written",
    "cli/config.py": "TOML, of bytes that the seam has read",
    "cli/messages.py": "appends to a log, and reads nothing",
    "process/free.py": "/proc and /sys",
    "training/data/on_disk.py": "its own file without a name",
    "process/resident.py": "/proc",
    "training/models/efficientnet.py": "weights that came with a package, no code",
    "study/parquet.py": "Parquet, behind a check of its columns",
    "study/folder.py": "its own JSON, made a moment before",
    "compare/read.py": "TOML, of bytes that the seam has read",
    "ops/native/__init__.py": "kernels, by their digest",
}


def test_files_are_read_through_one_seam() -> None:
    root = Path(trady.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if OPENS.search(path.read_text(encoding="utf-8").replace("os.open(", ""))
    }
    assert found - set(ALLOWED) == set(), "read it with trady.records.versioned.Format"
    assert set(ALLOWED) - found == set(), "a permission that nobody uses any more goes"
