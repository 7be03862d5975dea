"""Augmentation: random crops, mirror images and colours, as a pure function of (seed, epoch, image).

So an image looks the same on every number of processes and after a resume, and a run needs no second copy of its data.
The operations are those of torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip`` and ``ColorJitter``, which
cannot be imported beside every build of PyTorch that trady runs on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trady.errors import DataError
from trady.training.data.datasets import Example, ImageDataset, epoch_seed

AugmentName = Literal["none", "light", "paper"]

#: Attempts at a crop of a random shape before the whole image is taken.
_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """How images are varied while a model trains on them.

    Attributes:
        area: Least part of an image's area that a crop keeps; up to all of it.
        ratio: Largest ratio of a crop's sides, before it is resized to a square.
        flip: Probability of a mirror image.
        jitter: Brightness, contrast and saturation are each multiplied by a factor in 1 ± jitter, in a random order.
    """

    area: float
    ratio: float = 4 / 3
    flip: float = 0.5
    jitter: float = 0.0

    def __call__(self, image: Tensor, size: int, random: np.random.Generator) -> Tensor:
        """Vary one image.

        Args:
            image: ``[C, H, W]`` float32, pixels from 0 to 255.
            size: Height and width of the result.
            random: All randomness comes from here.

        Returns:
            ``[C, size, size]``, pixels from 0 to 255.
        """
        top, left, height, width = self.crop(image.shape[-2], image.shape[-1], random)
        part = image[None, :, top : top + height, left : left + width]
        if part.shape[-2:] != (size, size):
            part = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        image = part[0].flip(-1) if random.random() < self.flip else part[0]
        if not self.jitter:
            return image
        factors = random.uniform(max(0.0, 1 - self.jitter), 1 + self.jitter, 3).tolist()
        for which in random.permutation(3):
            image = _JITTERS[which](image, factors[which]).clamp_(0, 255)
        return image

    def crop(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a random part of an image."""
        for _ in range(_ATTEMPTS):
            area = height * width * random.uniform(self.area, 1.0)
            ratio = math.exp(random.uniform(-math.log(self.ratio), math.log(self.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
        return 0, 0, height, width


def _grey(image: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, ``[1, H, W]``; an image of one channel is grey already."""
    if image.shape[0] != 3:
        return image
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(3, 1, 1)
    return (image * weights).sum(0, keepdim=True)


_JITTERS = (
    lambda image, factor: image * factor,
    lambda image, factor: torch.lerp(_grey(image).mean().expand_as(image), image, factor),
    lambda image, factor: torch.lerp(_grey(image).expand_as(image), image, factor),
)

#: ``paper`` is what the authors of arXiv 2510.19675 train with, in the code of their earlier papers.
AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "light": Augmentation(area=0.5),
    "paper": Augmentation(area=0.08, jitter=0.4),
}


class AugmentedDataset(torch.utils.data.Dataset[Example]):
    """Images of a data set, varied anew in each epoch.

    Attributes:
        plain: The images as they are.
        augmentation: How they are varied.
        seed: Seed of the run.
        epoch: The epoch whose images come next.
    """

    def __init__(self, plain: ImageDataset, augmentation: Augmentation, seed: int) -> None:
        self.plain, self.augmentation, self.seed, self.epoch = plain, augmentation, seed, 0

    def __len__(self) -> int:
        return len(self.plain)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose images come next."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Return the images at ``indices``, each ``[3, size, size]`` float32, with their labels."""
        size, run = self.plain.image_size, epoch_seed(self.seed, self.epoch, "augment")
        pixels = self.plain.pixels_of(indices)
        images = [
            self.augmentation(image, size, np.random.default_rng([run, index]))
            for image, index in zip(pixels, indices, strict=True)
        ]
        labels = self.plain.labels[np.asarray(indices, dtype=np.int64)].tolist()
        return list(zip(self.plain.normalized(torch.stack(images)).unbind(), labels, strict=True))


def check_name(name: str) -> Augmentation | None:
    """Return the augmentation of a name.

    Raises:
        DataError: There is none; the message lists all.
    """
    if name not in AUGMENTATIONS:
        raise DataError(f"augment={name!r} is not known; there are {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


def augmented(data: Any, name: str, seed: int) -> Any:
    """Return training data as it is to be read.

    Args:
        data: What the run was given.
        name: A key of :data:`AUGMENTATIONS`.
        seed: Seed of the run.

    Raises:
        DataError: There is no such augmentation, or the data is not what :func:`trady.load_data` reads.
    """
    augmentation = check_name(name)
    if augmentation is None:
        return data
    if not isinstance(data, ImageDataset):
        raise DataError(
            f"augment={name!r} varies images that trady.load_data has read, and the training data is a "
            f'{type(data).__name__}: leave it out (augment="none"), or put transforms into that data set'
        )
    return AugmentedDataset(data, augmentation, seed)


def as_it_is(data: Any) -> Any:
    """Return the data without augmentation."""
    return data.plain if isinstance(data, AugmentedDataset) else data
