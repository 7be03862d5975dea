"""Augmentation: what comes out, that it is a pure function of (seed, epoch, image), and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import trady
from tests.small_task import StopAfter, small_data, small_net
from trady.errors import CheckpointError, DataError
from trady.training.data.augment import AUGMENTATIONS, Augmentation, AugmentedDataset, augmented
from trady.training.data.datasets import CENTERED, ImageDataset
from trady.training.data.loaders import start_epoch, training_batches
from trady.training.data.observed_batches import measured_on


def photographs(count: int = 12, size: int = 20, channels: int = 3, image_size: int = 16) -> ImageDataset:
    generator = np.random.default_rng(0)
    shape = (count, size, size, channels) if channels == 3 else (count, size, size)
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    return ImageDataset(pixels, np.arange(count, dtype=np.int64) % 3, image_size, CENTERED)


def varied(name: str = "paper", seed: int = 0, **options: Any) -> AugmentedDataset:
    data = augmented(photographs(**options), name, seed)
    assert isinstance(data, AugmentedDataset)
    return data


def stacked(data: AugmentedDataset, indices: list[int]) -> torch.Tensor:
    return torch.stack([image for image, _ in data.__getitems__(indices)])


@settings(max_examples=40)
@given(indices=st.lists(st.integers(0, 11), min_size=1, max_size=12), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_image_depends_on_seed_epoch_and_its_own_place_alone(indices: list[int], seed: int, epoch: int) -> None:
    together, alone = varied(seed=seed), varied(seed=seed)
    together.set_epoch(epoch)
    alone.set_epoch(epoch)
    one_by_one = torch.stack([alone[index][0] for index in reversed(indices)]).flip(0)
    assert torch.equal(stacked(together, indices), one_by_one)


def test_images_differ_between_epochs_seeds_and_places() -> None:
    data = varied()
    first = stacked(data, [0, 1])
    data.set_epoch(1)
    assert not torch.equal(first, stacked(data, [0, 1]))
    assert not torch.equal(first, stacked(varied(seed=1), [0, 1]))


@pytest.mark.parametrize("name", ["light", "paper"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_models_format_and_keep_their_labels(name: str, channels: int) -> None:
    data = varied(name, channels=channels)
    found = data.__getitems__(list(range(12)))
    assert [label for _, label in found] == data.plain.labels.tolist()
    for image, _ in found:
        assert image.shape == (3, 16, 16)
        assert image.dtype == torch.float32
        assert image.min() >= -1 - 1e-6
        assert image.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["light", "paper"])
def test_crops_stay_inside_and_keep_the_area_that_is_promised(name: str) -> None:
    augmentation = AUGMENTATIONS[name]
    assert augmentation is not None
    areas = []
    for number in range(2000):
        top, left, height, width = augmentation.crop(40, 30, np.random.default_rng(number))
        assert 0 <= top <= 40 - height
        assert 0 <= left <= 30 - width
        assert width / height < 1.5
        assert height / width < 1.5
        areas.append(height * width / 1200)
    assert augmentation.area - 0.03 < min(areas) < augmentation.area + 0.05
    assert max(areas) > 0.85


def test_a_crop_that_is_never_possible_is_the_whole_image() -> None:
    assert Augmentation(area=1.0).crop(1, 100, np.random.default_rng(0)) == (0, 0, 1, 100)


def test_half_of_the_images_are_mirrored() -> None:
    mirror = Augmentation(area=1.0, ratio=1.0)
    image = torch.arange(64.0).reshape(1, 8, 8)
    found = [mirror(image, 8, np.random.default_rng(number)) for number in range(400)]
    mirrored = sum(torch.equal(one, image.flip(-1)) for one in found)
    assert mirrored + sum(torch.equal(one, image) for one in found) == 400
    assert 150 < mirrored < 250


def test_colours_change_as_torchvision_changes_them() -> None:
    # torchvision: brightness blends with black, contrast with the mean of the luma, saturation with the luma.
    image = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    random = np.random.default_rng(7)
    jitter = Augmentation(area=1.0, ratio=1.0, flip=0.0, jitter=0.4)
    found = jitter(image, 5, np.random.default_rng(7))
    jitter.crop(5, 5, random)
    random.random()
    factors, order = random.uniform(0.6, 1.4, 3), random.permutation(3)
    expected = image.clone()
    for which in order:
        grey = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
        base = [torch.zeros(()), grey.mean(), grey[None]][which]
        expected = (factors[which] * expected + (1 - factors[which]) * base).clamp(0, 255)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, image)
    assert luma.shape == (5, 5)


def test_policies_are_measured_on_images_as_they_are() -> None:
    data = varied()
    loader = training_batches(data, 4, 0)
    plain = training_batches(data.plain, 4, 0)
    for epoch in (0, 3):
        start_epoch(loader, epoch)
        for (x, y), (same_x, same_y) in zip(
            measured_on(loader, 2, 0, torch.device("cpu")), measured_on(plain, 2, 0, torch.device("cpu")), strict=True
        ):
            assert torch.equal(x, same_x)
            assert torch.equal(y, same_y)


def test_the_epoch_reaches_the_images_through_the_loader() -> None:
    loader = training_batches(varied(), 4, 0)
    start_epoch(loader, 2)
    assert loader.dataset.epoch == 2  # type: ignore[attr-defined]


def finetune(out: Path, augment: Any, progress: Any = False, *, resume: bool = False) -> trady.Result:
    return trady.finetune(
        small_net(), small_data(40, 0), small_data(16, 1), budget="elements:900", epochs=3, batch_size=8, out=out,
        augment=augment, resume=resume, progress=progress,
    )  # fmt: skip


def test_a_resumed_run_sees_the_images_of_the_unbroken_one(tmp_path: Path) -> None:
    whole = finetune(tmp_path / "whole", "paper")
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "cut", "paper", StopAfter(1))
    resumed = finetune(tmp_path / "cut", "paper", resume=True)
    assert [epoch.train_loss for epoch in resumed.history] == [epoch.train_loss for epoch in whole.history]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
    assert finetune(tmp_path / "plain", "none").history[-1].train_loss != whole.history[-1].train_loss


def test_a_run_is_not_gone_on_with_under_another_augmentation(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, "paper", StopAfter(1))
    with pytest.raises(CheckpointError, match="augment was 'paper', is now None"):
        finetune(tmp_path, "none", resume=True)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)),
        DataLoader(TensorDataset(torch.zeros(4, 8))),
        ["a sentence", "another"],
    ],
)
def test_data_that_is_no_images_is_refused_with_what_to_do(data: Any) -> None:
    with pytest.raises(DataError, match=r"varies images that trady.load_data has read.*augment=\"none\""):
        augmented(data, "light", 0)
    assert augmented(data, "none", 0) is data


def test_an_unknown_augmentation_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="augment='heavy' is not known; there are none, light, paper"):
        finetune(tmp_path / "run", "heavy")
    assert not (tmp_path / "run").exists()
