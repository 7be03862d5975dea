"""Folders of photographs as people have them: what is read, what is said of the rest, and what is refused."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.small_task import pixels, write_npz
from trady.errors import DataError, ResourceError
from trady.training.data import decoding, image_files
from trady.training.data.image_files import read_square, readable_suffixes
from trady.training.data.load import load_data
from trady.training.data.stratified import stratified

Image = pytest.importorskip("PIL.Image")


def tree(top: Path, parts: dict[str, dict[str, int]], size: tuple[int, int] = (20, 14)) -> Path:
    value = 0
    for part, classes in parts.items():
        for name, count in classes.items():
            (top / part / name).mkdir(parents=True)
            for index in range(count):
                value += 1
                Image.new("RGB", size, (value, 2 * value, 3 * value)).save(top / part / name / f"{index:02}.png")
    return top


@pytest.mark.parametrize(("train", "evaluation"), [("Train", "Test"), ("TRAIN", "VAL"), ("training", "Validation")])
def test_parts_may_have_capitals(tmp_path: Path, train: str, evaluation: str) -> None:
    tree(tmp_path, {train: {"a": 3, "b": 2}, evaluation: {"a": 1, "b": 1}})
    data = load_data(tmp_path, image_size=8)
    assert (len(data.train), len(data.evaluation), data.classes) == (5, 2, ("a", "b"))


def test_what_was_found_is_said_in_a_line(tmp_path: Path) -> None:
    tree(tmp_path, {"train": {"dress": 3, "hat": 2}, "val": {"dress": 1, "hat": 1}})
    for name in ("dress/a.txt", "hat/b.heic", "hat/c.HEIC", "hat/.hidden", "loose.png"):
        (tmp_path / "train" / name).write_bytes((tmp_path / "train/hat/00.png").read_bytes()[:30])
    (tmp_path / "val/hat/broken.png").write_text("no image")
    data = load_data(tmp_path, image_size=8, on_unreadable="skip")
    heic = ".heic" if ".heic" in readable_suffixes() else ".heic (read with pip install pillow-heif)"
    assert data.ignored == {heic: 2, ".txt": 1, "image in no class folder": 1}
    assert str(data) == (
        f"5 + 2 images, 2 classes: dress, hat; unreadable: 1; ignored: 2 {heic}, 1 image in no class folder, 1 .txt"
    )
    limited = load_data(tmp_path, image_size=8, on_unreadable="skip", limit=(4, None))
    assert str(limited).startswith("4 + 2 of 5 + 2 images, 2 classes")


def test_a_line_names_the_first_classes_and_says_that_a_part_was_held_out(tmp_path: Path) -> None:
    tree(tmp_path, {"": {f"class{n}": 5 for n in range(9)}})
    names = ", ".join(f"class{n}" for n in range(6))
    assert str(load_data(tmp_path, image_size=8)) == (
        f"36 + 9 images (a fifth of each class held out), 9 classes: {names}, …"
    )
    assert str(load_data(write_npz(tmp_path / "d.npz"), image_size=12)).startswith("48 + 24 images, 3 classes: 0, 1, 2")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"a": 3}, "val": {"a": 1}}, r"train has one class, a: telling images apart takes two"),
        ({"": {"a": 3}}, "has one class, a"),
        ({"train": {"a": 3, "b": 0, "c": 0}, "val": {"a": 1}}, r"no images of 2 of 3 classes: b, c\. Put images there"),
        ({"train": {"a": 3, "b": 2}, "val": {"a": 1, "d": 1}}, r"no images of to train on: d\. Add a folder of each"),
        ({"val": {"a": 3, "b": 1}}, r"has val/ but no train/ beside it: name the other part train/"),
        ({"train": {"a": 3, "b": 2}, "val": {"a": 0}}, r"val has 2 class folders but no image in them"),
    ],
)
def test_classes_that_nothing_can_be_learnt_of_are_refused(
    tmp_path: Path, parts: dict[str, dict[str, int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_data(tree(tmp_path, parts), image_size=8)


def test_an_empty_class_says_what_lies_there_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"train": {"a": 3, "b": 0}, "val": {"a": 1}})
    (tmp_path / "train/b/photo.heic").write_text("x")
    monkeypatch.setattr("trady.training.data.image_folder.readable_suffixes", lambda: image_files.SUFFIXES)
    with pytest.raises(DataError, match=r"classes: b, but 1 \.heic \(read with pip install pillow-heif\)\. Put"):
        load_data(tmp_path, image_size=8)


def test_a_class_of_which_no_file_can_be_read_is_refused_with_a_reason(tmp_path: Path) -> None:
    tree(tmp_path, {"train": {"a": 3, "b": 0}, "val": {"a": 1}})
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / "train/b" / name).write_text("no image")
    with pytest.raises(DataError, match=r"no image of b in .*train can be read, e\.g\. .*one\.jpg cannot be read as"):
        load_data(tmp_path, image_size=8, on_unreadable="skip")


def test_every_unreadable_file_is_named_at_once(tmp_path: Path) -> None:
    tree(tmp_path, {"train": {"a": 3, "b": 3}, "val": {"a": 1}})
    for number in range(25):
        (tmp_path / "train/b" / f"x{number:02}.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"25 of 31 images cannot be read; mend or remove them, or skip") as caught:
        load_data(tmp_path, image_size=8)
    lines = str(caught.value).splitlines()
    assert [Path(line.split(" cannot be")[0]).name for line in lines[1:21]] == [f"x{n:02}.jpg" for n in range(20)]
    assert lines[21:] == ["  … and 5 more"]


def test_grey_of_sixteen_bits_is_scaled_to_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.round(values / 257).astype(np.uint8)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        found = read_square(tmp_path / name, 8)
        assert np.abs(found[..., 0].astype(int) - expected).max() <= 1
        assert np.array_equal(found[..., 0], found[..., 2])
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    assert np.abs(read_square(tmp_path / "float.tif", 8)[..., 1].astype(int) - expected).max() <= 1
    Image.fromarray(expected).save(tmp_path / "eight.png")
    assert np.array_equal(read_square(tmp_path / "eight.png", 8)[..., 0], expected)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:1200, :1600]
    waves = 127 + 60 * np.sin(x / 90) + 60 * np.cos(y / 70)
    Image.fromarray(np.stack([waves, waves[::-1], waves], -1).astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)
    decoded: list[int] = []
    square = image_files.square

    def seen(image: Any, size: int) -> Any:
        decoded.append(image.width)
        return square(image, size)

    monkeypatch.setattr(image_files, "square", seen)
    fast = read_square(tmp_path / "large.jpg", 96)
    monkeypatch.setattr(image_files, "_draft", lambda image, size: None)
    whole = read_square(tmp_path / "large.jpg", 96)
    assert decoded == [400, 1600]
    difference = np.abs(fast.astype(int) - whole)
    assert difference.mean() < 1
    assert difference.max() < 8


@pytest.mark.skipif(".avif" not in readable_suffixes(), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_reads_it(tmp_path: Path) -> None:
    tree(tmp_path, {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}})
    Image.new("RGB", (20, 14), (200, 100, 50)).save(tmp_path / "train/a/9.AVIF", format="avif")
    data = load_data(tmp_path, image_size=8)
    assert len(data.train) == 5
    assert np.abs(data.train.pixels[2, 0, 0].astype(int) - (200, 100, 50)).max() < 12


def test_images_are_decoded_by_several_threads_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"train": {"a": 20, "b": 20}, "val": {"a": 1}})
    monkeypatch.setattr(decoding, "_processors", lambda: 4)
    threads: set[int] = set()
    both = threading.Barrier(2, timeout=20)

    def seen(path: Path, *more: Any) -> Any:
        if path.name in ("00.png", "01.png") and path.parts[-3:-1] == ("train", "a"):
            both.wait()  # two of them are decoded at once, or this would never end
        threads.add(threading.get_ident())
        return image_files.decode_square(path, *more)

    monkeypatch.setattr(decoding, "decode_square", seen)
    told: list[tuple[int, int]] = []
    data = load_data(tmp_path, image_size=8, progress=lambda done, count: told.append((done, count)))
    assert len(threads) > 1
    assert data.train.pixels[:, 0, 0, 0].tolist() == list(range(1, 41))
    assert told == [(done, 40) for done in range(1, 41)] + [(1, 1)]


def test_a_full_disk_ends_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"train": {"a": 20, "b": 20}})

    def full(path: Path, *more: Any) -> Any:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(decoding, "decode_square", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        load_data(tmp_path, image_size=8)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trady-decode")]


def test_large_images_wait_for_room_and_are_decoded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"train": {"a": 6, "b": 6}, "val": {"a": 1}}, size=(40, 30))
    monkeypatch.setattr(decoding, "_PIXELS_AT_ONCE", 1300)  # one image at a time, each nearly all of the room
    monkeypatch.setattr(decoding, "_processors", lambda: 4)
    assert load_data(tmp_path, image_size=8).train.pixels[:, 0, 0, 0].tolist() == list(range(1, 13))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[str]]:
    """A folder of images, where decoded ones are kept, and the names of those that were decoded since."""
    source = tree(tmp_path / "photos", {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}})
    (source / "train/a/broken.png").write_text("no image")
    monkeypatch.setattr(decoding, "KEPT_SECONDS", 0.0)
    decoded: list[str] = []

    def seen(path: Path, *more: Any) -> Any:
        decoded.append(path.name)
        return image_files.decode_square(path, *more)

    monkeypatch.setattr(decoding, "decode_square", seen)
    return source, tmp_path / "kept", decoded


def test_images_that_were_kept_are_not_decoded_again(kept: tuple[Path, Path, list[str]]) -> None:
    source, keep, decoded = kept
    first = load_data(source, image_size=8, on_unreadable="skip", keep=keep)
    assert len(decoded) == 9
    again = load_data(source, image_size=8, on_unreadable="skip", keep=keep)
    assert len(decoded) == 9
    assert np.array_equal(first.train.pixels, again.train.pixels)
    assert np.array_equal(first.evaluation.pixels, again.evaluation.pixels)
    assert (first.skipped, first.train.labels.tolist()) == (again.skipped, again.train.labels.tolist())
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        load_data(source, image_size=8, keep=keep)
    assert len(decoded) == 9


@pytest.mark.parametrize("change", ["size", "file", "new", "record", "pixels", "version"])
def test_kept_images_of_other_files_or_damaged_ones_are_not_taken(
    kept: tuple[Path, Path, list[str]], change: str
) -> None:
    source, keep, decoded = kept
    first = load_data(source, image_size=8, on_unreadable="skip", keep=keep)
    expected = first.train.pixels[:, 0, 0, 0].tolist()
    record = keep / "train.json"
    if change == "file":
        Image.new("RGB", (33, 33), (77, 7, 7)).save(source / "train/a/00.png")
        expected[0] = 77
    elif change == "new":
        Image.new("RGB", (9, 9), (78, 7, 7)).save(source / "train/b/9.png")
        expected.append(78)
    elif change == "record":
        record.write_text(record.read_text()[:-20])
    elif change == "pixels":
        (keep / "train.pixels").write_bytes((keep / "train.pixels").read_bytes()[:-1])
    elif change == "version":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"version": 99}))
    again = load_data(source, image_size=9 if change == "size" else 8, on_unreadable="skip", keep=keep)
    assert Counter(decoded)["01.png"] > 3
    assert again.train.pixels[:, 0, 0, 0].tolist() == expected


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 5))
def test_a_stratified_part_takes_its_share_of_every_class(labels: list[int], share: float, seed: int) -> None:
    given_labels = np.asarray(labels)
    kept_at, held_at = stratified(given_labels, share, seed)
    assert sorted([*kept_at, *held_at]) == list(range(len(labels)))
    assert len(held_at) == max(1, round(share * len(labels)))
    held, sizes = Counter(given_labels[held_at].tolist()), Counter(labels)
    possible = len(held_at) <= sum(count - 1 for count in sizes.values())
    for label, count in sizes.items():
        assert not possible or held[label] < count  # something of every class is left to train on
        assert held[label] >= min(int(count * share), count - 1)
    assert np.array_equal(held_at, stratified(given_labels, share, seed)[1])


def test_the_part_that_is_held_out_has_every_class(tmp_path: Path) -> None:
    images, labels = pixels(30, 0)
    labels = np.repeat([0, 1, 2], [20, 5, 5])
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    data = load_data(tmp_path / "d.npz", image_size=12)
    assert Counter(data.evaluation.labels.tolist()) == {0: 4, 1: 1, 2: 1}
