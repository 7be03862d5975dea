from __future__ import annotations

import gzip
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.small_task import pixels, write_npz
from trady.errors import DataError
from trady.training.data import decoding, fashion_mnist
from trady.training.data.datasets import CENTERED, EpochSampler, ImageDataset, Normalization, epoch_order
from trady.training.data.load import load_data

Image = pytest.importorskip("PIL.Image")

NO_IMAGES = np.zeros((0, 12, 12, 3), np.uint8)


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    save: Any = np.savez
    save(path, **arrays)
    return path


def image_tree(top: Path, parts: dict[str, dict[str, int]], size: tuple[int, int] = (20, 14)) -> Path:
    """Write ``count`` images a class below ``top/part``; each filled with a value of its own."""
    value = 0
    for part, classes in parts.items():
        for name, count in classes.items():
            place = top / part / name
            place.mkdir(parents=True)
            for index in range(count):
                value += 1
                Image.new("RGB", size, (value, 2 * value, 3 * value)).save(place / f"{index}.png")
    return top


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("images_train", "labels_train", "images_val", "labels_val"),
        ("train_x", "train_y", "valid_x", "valid_y"),
    ],
)
def test_npz_is_read_under_the_usual_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    train, test = pixels(9, 0), pixels(6, 1)
    path = save_npz(tmp_path / "d.npz", **dict(zip(names, (*train, *test), strict=True)))
    data = load_data(path, image_size=12)
    assert (len(data.train), len(data.evaluation), data.classes) == (9, 6, ("0", "1", "2"))
    assert np.array_equal(data.train.pixels, train[0])
    assert np.array_equal(data.evaluation.labels, test[1])


def test_npz_with_one_part_is_shared_out_the_same_way_for_the_same_seed(tmp_path: Path) -> None:
    images, labels = pixels(30, 0)
    path = save_npz(tmp_path / "d.npz", images=images, labels=labels)
    first, again, other = (load_data(path, image_size=12, seed=seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.evaluation)) == (24, 6)
    assert np.array_equal(first.train.pixels, again.train.pixels)
    assert not np.array_equal(first.evaluation.pixels, other.evaluation.pixels)
    both = np.concatenate([first.train.pixels, first.evaluation.pixels])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in images)


def test_classes_of_an_npz_are_named_by_the_file(tmp_path: Path) -> None:
    images, labels = pixels(9, 0)
    path = save_npz(
        tmp_path / "d.npz", x_train=images, y_train=labels, classes=np.array(["red", "green", "blue", "grey"])
    )
    assert load_data(path, image_size=12).classes == ("red", "green", "blue", "grey")


def test_channel_first_grey_and_column_labels_are_understood(tmp_path: Path) -> None:
    images, labels = pixels(9, 0)
    plain = load_data(save_npz(tmp_path / "a.npz", images=images, labels=labels), image_size=12)
    first = load_data(
        save_npz(tmp_path / "b.npz", images=images.transpose(0, 3, 1, 2), labels=labels[:, None]),
        image_size=12,
    )
    assert np.array_equal(plain.train.pixels, first.train.pixels)
    grey = load_data(save_npz(tmp_path / "c.npz", images=images[..., :1], labels=labels), image_size=12)
    image, _ = grey.train[0]
    assert image.shape == (3, 12, 12)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": None}, "expected x_train, y_train"),
        ({"y_train": np.arange(8) % 3}, "one label for each image"),
        ({"y_train": np.arange(9) % 3 - 1}, "labels run from -1 to 1"),
        ({"y_train": np.arange(9) / 4}, "whole numbers"),
        ({"y_train": np.array(["a"] * 9)}, "whole numbers"),
        ({"classes": np.array(["a", "b"])}, "there are 2 classes: 0 to 1 are possible"),
        ({"x_train": np.zeros((9, 12, 12, 5), np.uint8)}, r"expected \[N, H, W\]"),
        ({"x_train": np.zeros((9, 0, 12, 3), np.uint8)}, "no pixels"),
        ({"x_train": np.zeros((9, 12, 12, 3), np.float32)}, "expected uint8"),
        ({"x_train": np.full((9, 12, 12, 3), 256)}, "expected uint8"),
        (
            {"x_train": np.zeros((0, 12, 12, 3), np.uint8), "y_train": np.zeros(0, np.int64)},
            "no images to train",
        ),
        (
            {"x_test": np.zeros((0, 12, 12, 3), np.uint8), "y_test": np.zeros(0, np.int64)},
            "no images to evaluate",
        ),
    ],
)
def test_a_wrong_npz_is_refused_with_what_is_there(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    x_train, y_train = pixels(9, 0)
    x_test, y_test = pixels(6, 1)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, **change}
    path = save_npz(tmp_path / "d.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError, match=message) as caught:
        load_data(path, image_size=12)
    assert "d.npz" in str(caught.value)


def test_a_damaged_or_pickled_npz_is_refused(tmp_path: Path) -> None:
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(cut, image_size=12)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x_train=np.array([{"a": 1}], dtype=object), y_train=np.zeros(1, np.int64))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(pickled, image_size=12)


def test_an_unknown_source_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; it reads Fashion-MNIST \(fashion-mnist\)"):
        load_data(tmp_path / "nothing", image_size=12)
    (tmp_path / "table.xml").write_text("")
    with pytest.raises(DataError, match="is not a data set that trady reads"):
        load_data(tmp_path / "table.xml", image_size=12)
    with pytest.raises(DataError, match="does not exist"):
        load_data(tmp_path / "nothing.npz", image_size=12)


@pytest.mark.parametrize("evaluation", ["val", "valid", "validation", "test"])
def test_a_folder_with_parts_is_read_as_it_is(tmp_path: Path, evaluation: str) -> None:
    image_tree(tmp_path, {"train": {"cat": 3, "dog": 2}, evaluation: {"cat": 1, "dog": 2}})
    data = load_data(tmp_path, image_size=8)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.evaluation.labels.tolist() == [0, 1, 1]
    assert data.train.pixels[1, 0, 0].tolist() == [2, 4, 6]


def test_a_folder_without_parts_is_shared_out(tmp_path: Path) -> None:
    image_tree(tmp_path, {"": {"a": 5, "b": 5}})
    data = load_data(tmp_path, image_size=8)
    assert (len(data.train), len(data.evaluation)) == (8, 2)


def test_an_unreadable_image_is_refused_with_its_path_or_skipped_and_counted(tmp_path: Path) -> None:
    image_tree(tmp_path, {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 1}})
    whole = (tmp_path / "train/a/1.png").read_bytes()
    (tmp_path / "train/a/1.png").write_bytes(whole[:40])
    (tmp_path / "train/b/broken.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"(?s)2 of 6 images cannot be read; .*skip.*a/1\.png.*b/broken\.jpg"):
        load_data(tmp_path, image_size=8)
    data = load_data(tmp_path, image_size=8, on_unreadable="skip")
    assert [Path(path).name for path in data.skipped] == ["1.png", "broken.jpg"]
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.pixels[1, 0, 0].tolist() == [3, 6, 9]


def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no subfolders"):
        load_data(tmp_path, image_size=8)
    (tmp_path / "train/a").mkdir(parents=True)
    with pytest.raises(DataError, match="no image in them"):
        load_data(tmp_path, image_size=8)
    image_tree(tmp_path, {"train": {"c": 2}, "val": {"b": 1}})
    (tmp_path / "train/a").rmdir()
    with pytest.raises(DataError, match=r"classes that there are no images of to train on: b\. Add a folder"):
        load_data(tmp_path, image_size=8)


def test_a_large_folder_is_kept_in_a_file_with_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tree(tmp_path, {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 1}})
    inside = load_data(tmp_path, image_size=8)
    monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 10)
    outside = load_data(tmp_path, image_size=8)
    assert isinstance(outside.train.pixels, np.memmap)
    assert torch.equal(inside.train.batch([4, 0])[0], outside.train.batch([4, 0])[0])


def test_images_are_upright_and_cropped_to_their_centre(tmp_path: Path) -> None:
    image_tree(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"a": 1}})
    picture = Image.new("L", (30, 10), 0)
    picture.paste(255, (10, 0, 20, 10))
    picture.save(tmp_path / "train/a/0.png")
    data = load_data(tmp_path, image_size=10)
    assert data.train.pixels[0].min() == 255


def idx(values: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def debian_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    return tmp_path


def test_fashion_mnist_is_read_from_the_files_of_debians_package(debian_files: Path) -> None:
    data = load_data("fashion-mnist", image_size=32, limit=(10, 5))
    assert (len(data.train), len(data.evaluation), len(data.classes)) == (10, 5, 10)
    images, labels = data.train.batch(range(10))
    assert images.shape == (10, 3, 32, 32)
    assert labels.dtype == torch.int64


def test_a_damaged_idx_file_is_refused(debian_files: Path) -> None:
    path = debian_files / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:200], gzip.compress(b"\0\0\x09\x01"), idx(np.zeros(4, np.uint8))[:-3]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="train-images"):
            load_data("fashion-mnist", image_size=32)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match="its header says"):
        load_data("fashion-mnist", image_size=32)


def test_fashion_mnist_comes_from_the_hub_where_the_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "missing")
    asked = []

    class Rows:
        def with_format(self, name: str) -> dict[str, list[object]]:
            return {"image": [np.zeros((28, 28), np.uint8)] * 3, "label": [0, 9, 4]}

    def load_dataset(name: str, split: str) -> Rows:
        asked.append((name, split))
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load_data("fashion-mnist", image_size=28)
    assert asked == [(fashion_mnist.HUB_NAME, "train"), (fashion_mnist.HUB_NAME, "test")]
    assert data.train.labels.tolist() == [0, 9, 4]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: 1 / 0))
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_data("fashion-mnist", image_size=28)


def test_pixels_are_normalized_as_the_model_wants_them() -> None:
    images = np.array([[[[0, 127, 255]]]], dtype=np.uint8)
    dataset = ImageDataset(images, np.zeros(1, np.int64), 1, Normalization((0.0, 127.0, 255.0), (1.0, 2.0, 3.0)))
    assert dataset[0][0].flatten().tolist() == [0.0, 0.0, 0.0]


@given(st.integers(1, 9), st.integers(1, 17), st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_a_batch_is_its_images_one_by_one(height: int, size: int, indices: list[int]) -> None:
    images = np.random.default_rng(height).integers(0, 256, (6, height, height + 2, 3)).astype(np.uint8)
    dataset = ImageDataset(images, np.arange(6), size, CENTERED)
    batch, labels = dataset.batch(indices)
    assert batch.shape == (len(indices), 3, size, size)
    assert batch.dtype == torch.float32
    assert labels.tolist() == indices
    for place, index in enumerate(indices):
        torch.testing.assert_close(batch[place], dataset[index][0], rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 50))
def test_the_order_is_a_permutation_made_of_seed_and_epoch_only(length: int, seed: int, epoch: int) -> None:
    sampler = EpochSampler(length, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(length))
    torch.manual_seed(epoch)
    assert order == epoch_order(length, seed, epoch).tolist()


def test_orders_of_different_epochs_differ() -> None:
    orders = {tuple(epoch_order(50, 0, epoch).tolist()) for epoch in range(20)}
    assert len(orders) == 20


def test_a_limit_keeps_the_same_images_for_the_same_seed(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz")
    first, again, other = (load_data(path, image_size=12, limit=20, seed=seed) for seed in (0, 0, 1))
    assert len(first.train) == 20
    assert np.array_equal(first.train.pixels, again.train.pixels)
    assert not np.array_equal(first.train.pixels, other.train.pixels)
    with pytest.raises(DataError, match="limit is 0"):
        load_data(path, image_size=12, limit=0)
