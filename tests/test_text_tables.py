"""Tables of texts: every format, with and without a header, quotes and folders; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small_texts import sentences, write_table
from trady.errors import DataError
from trady.training.texts.tables import Table, is_texts, read_file, read_lines, read_tables

pytest.importorskip("datasets")

ROWS = [("a film", "good"), ('he said "no", twice', "bad"), ("NA", "bad"), ("two\nlines", "good")]


def columns(table: Table) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in table.columns.items()}


def expected(rows: list[tuple[str, str]] = ROWS) -> dict[str, list[Any]]:
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.parquet"])
def test_a_table_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS))
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table(expected()), path)
    else:
        write_table(path, ROWS)
    assert columns(read_file(path)) == expected()


def test_classes_that_a_parquet_file_names_are_known(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(
        tmp_path / "d.parquet"
    )
    table = read_file(tmp_path / "d.parquet")
    assert (columns(table)["label"], table.class_names) == ([1, 0], {"label": ("no", "yes")})


def test_a_table_without_a_header_is_one_of_texts_and_labels(tmp_path: Path) -> None:
    table = read_file(write_table(tmp_path / "sst2.tsv", [("a fine film", 1), ("a dull one", 0)], header=()))
    assert columns(table) == {"text": ["a fine film", "a dull one"], "label": ["1", "0"]}
    assert "has no header" in table.remarks[0]
    turned = read_file(write_table(tmp_path / "turned.csv", [(1, "a fine film"), (0, "a dull one")], header=()))
    assert columns(turned) == {"label": ["1", "0"], "text": ["a fine film", "a dull one"]}


@pytest.mark.parametrize("header", [("sentence", "label"), ("satz", "urteil"), ("Review", "Stars")])
def test_a_header_is_one(header: tuple[str, str], tmp_path: Path) -> None:
    table = read_file(write_table(tmp_path / "d.csv", [("a fine film", 1), ("a dull one", 0)], header))
    assert tuple(table.columns) == header
    assert len(table) == 2


def test_quotes_in_a_file_with_tabs_are_characters_unless_all_fields_are_quoted(tmp_path: Path) -> None:
    plain, quoted = tmp_path / "plain.tsv", tmp_path / "quoted.tsv"
    plain.write_text('text\tlabel\n"a film" of note\t1\nhe said "no\t0\n')
    quoted.write_text('text\tlabel\n"a ""fine"" film"\t1\n"tab\there"\t0\n')
    assert columns(read_file(plain))["text"] == ['"a film" of note', 'he said "no']
    assert columns(read_file(quoted))["text"] == ['a "fine" film', "tab\there"]


def test_semicolons_and_a_byte_order_mark_are_known(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("text;label\nein schöner Film;gut\n".encode("utf-8-sig"))
    assert columns(read_file(tmp_path / "d.csv")) == {"text": ["ein schöner Film"], "label": ["gut"]}


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    assert columns(read_file(tmp_path / "book.txt")) == {"text": ["one\n\ntwo\n"]}
    assert columns(read_lines("stdin", "one\n\ntwo\n")) == {"text": ["one", "two"]}


@pytest.mark.parametrize("evaluation", ["validation", "valid", "val", "dev", "test"])
def test_a_folder_has_parts_by_name(evaluation: str, tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", sentences(4, 0))
    write_table(tmp_path / f"{evaluation}-00000-of-00001.csv", sentences(2, 1))
    train, apart = read_tables(str(tmp_path))
    assert apart is not None
    assert (len(train), len(apart)) == (4, 2)


def test_a_validation_part_is_evaluated_on_before_a_test_part(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("test", 4), ("dev", 2)):
        write_table(tmp_path / f"{part}.csv", sentences(count, 1))
    train, apart = read_tables(str(tmp_path))
    assert (len(train), len(apart or ())) == (6, 2)


def test_several_files_of_a_part_are_put_together_also_below_data(tmp_path: Path) -> None:
    for number in range(2):
        write_table(tmp_path / "data" / f"train-{number}.csv", sentences(3, number))
    train, apart = read_tables(str(tmp_path))
    assert (len(train), apart) == (6, None)


def test_a_file_to_evaluate_on_takes_the_place_of_the_part(tmp_path: Path) -> None:
    write_table(tmp_path / "folder" / "train.csv", sentences(6, 0))
    write_table(tmp_path / "folder" / "test.csv", sentences(4, 0))
    mine = write_table(tmp_path / "mine.csv", sentences(2, 0))
    assert len(read_tables(str(tmp_path / "folder"), str(mine))[1] or ()) == 2


def test_what_is_meant_as_texts(tmp_path: Path) -> None:
    write_table(tmp_path / "texts" / "train.csv", sentences(2, 0))
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    write_table(tmp_path / "photos" / "labels.csv", sentences(2, 0))
    (tmp_path / "photos" / "README.txt").write_text("two cats")
    found = {name: is_texts(str(tmp_path / name)) for name in ("texts", "photos", "gone.jsonl", "gone", "x.npz")}
    assert found == {"texts": True, "photos": False, "gone.jsonl": True, "gone": False, "x.npz": False}
    assert is_texts("owner/name")
    assert is_texts("owner/name:configuration")
    assert not is_texts("fashion-mnist")


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "empty.csv is empty"),
        ("latin.csv", b"text,label\nsch\xf6n,1\n", r"is not UTF-8: byte 14 is 0xf6.*iconv"),
        ("ragged.csv", "text,label\na,1\nb,1,2,3\n", r"Expected 2 fields in line 3, saw 4"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b\n', "line 2 is no JSON"),
        ("list.jsonl", '{"text": "a"}\n[1]\n', r"line 2 is a list, and a row is an object"),
        ("no.parquet", "no table", "no.parquet cannot be read"),
        ("headed.csv", "text,label\n", "has no rows"),
        ("twice.csv", "text,text\na,b\n", "two columns of one name"),
        ("photo.jpg", "x", "is no table of texts; those that are read end in .csv"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_the_reason(
    name: str, content: bytes | str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_file(written(tmp_path / name, content))


def test_a_file_that_is_not_there_and_a_folder_of_many_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.csv does not exist"):
        read_tables(str(tmp_path / "gone.csv"))
    for name in ("a.csv", "b.csv"):
        write_table(tmp_path / name, sentences(2, 0))
    with pytest.raises(DataError, match=r"has 2 tables \(a.csv, b.csv\), and none is called train"):
        read_tables(str(tmp_path))
    (tmp_path / "a.csv").rename(tmp_path / "dev.csv")
    with pytest.raises(DataError, match=r"has dev.csv but no file called train"):
        read_tables(str(tmp_path))
    write_table(tmp_path / "train.csv", sentences(2, 0))
    write_table(tmp_path / "train2.csv", sentences(2, 0), ("sentence", "label"))
    with pytest.raises(DataError, match=r"train2.csv has the columns sentence, label, and .*train.csv has text, label"):
        read_tables(str(tmp_path))


def test_a_hub_that_does_not_answer_is_named_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(DataError, match=r"no file or folder owner/name, .*Hugging Face Hub: no route to host"):
        read_tables("owner/name")
