"""Images kept as bytes, and turned into normalized float batches on demand."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

Pixels = npt.NDArray[np.uint8]

Labels = npt.NDArray[np.int64]

Example = tuple[torch.Tensor, int]

#: Classes that are named in a line.
_NAMED = 6


@dataclass(frozen=True)
class Normalization:
    """What a model expects of its pixels: ``(pixel - mean) / std``, pixels from 0 to 255.

    Attributes:
        mean: One value a channel, or one for all.
        std: One value a channel, or one for all.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return float32 pixels ``[N, C, H, W]``, normalized."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, dtype=torch.float32).view(shape)
        std = torch.tensor(self.std, dtype=torch.float32).view(shape)
        return (pixels - mean) / std


#: Pixels in [-1, 1].
CENTERED = Normalization((127.5,), (127.5,))

#: The mean and standard deviation of ImageNet's channels.
IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class ImageDataset(Dataset[Example]):
    """Images and labels; pixels stay bytes until a batch is read.

    Args:
        pixels: ``[N, H, W]`` or ``[N, H, W, C]`` with C 1 or 3, uint8; an array, or what is indexed like one.
        labels: ``[N]``, int64.
        image_size: Height and width of the images that come out.
        normalization: Applied to the resized pixels.
        classes: Names of the classes, in the order of the labels, where they are known.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Labels,
        image_size: int,
        normalization: Normalization,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.image_size = image_size
        self.normalization = normalization
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Return the images at ``indices``, each ``[3, size, size]`` float32, with their labels."""
        images, labels = self.batch(indices)
        return list(zip(images.unbind(), labels.tolist(), strict=True))

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``[N, 3, size, size]`` float32 images and ``[N]`` int64 labels."""
        images, size = self.pixels_of(indices), (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return self.normalized(images), torch.from_numpy(self.labels[np.asarray(indices, dtype=np.int64)])

    def pixels_of(self, indices: Sequence[int]) -> torch.Tensor:
        """Return ``[N, C, H, W]`` float32 images as they were read, C 1 or 3, pixels from 0 to 255."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.pixels[np.asarray(indices, dtype=np.int64)]))
        return (pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)).to(torch.float32)

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Return ``[N, 3, H, W]`` images as the model takes them, from pixels ``[N, C, H, W]``."""
        return self.normalization(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images).contiguous()

    def head(self, limit: int | None, seed: int) -> ImageDataset:
        """Return up to ``limit`` images drawn with ``seed``; all of them without a limit."""
        if limit is None or limit >= len(self):
            return self
        index = np.sort(epoch_order(len(self), seed, 0).numpy()[:limit])
        return ImageDataset(self.pixels[index], self.labels[index], self.image_size, self.normalization, self.classes)


@dataclass(frozen=True)
class DataSplit:
    """A data set, read.

    Attributes:
        train: Images to train on.
        evaluation: Images to measure accuracy on; never trained on.
        classes: Names of the classes; a label is an index into them.
        skipped: Files that could not be read and were left out.
        ignored: How many other files lie there, by what they are.
        found: How many images there are to train and to evaluate on, before a limit; empty where that is not known.
        held_out: Whether the evaluation part was set apart here, because the source has none.
    """

    train: ImageDataset
    evaluation: ImageDataset
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    found: tuple[int, ...] = ()
    held_out: bool = False

    def __str__(self) -> str:
        """What was found, in a line: ``200 + 60 images, 10 classes: dress, hat, …; ignored: 4 .heic``."""
        parts = len(self.train), len(self.evaluation)
        counts = " + ".join(map(str, parts))
        if self.found and parts != self.found:
            counts += f" of {' + '.join(map(str, self.found))}"
        names = [name.encode("utf-8", "backslashreplace").decode() for name in self.classes[:_NAMED]]
        classes = f"{len(self.classes)} classes: {', '.join(names)}{', …' if len(self.classes) > _NAMED else ''}"
        said = [f"{counts} images{' (a fifth of each class held out)' if self.held_out else ''}, {classes}"]
        if self.skipped:
            said.append(f"unreadable: {len(self.skipped)}")
        if self.ignored:
            said.append(f"ignored: {', '.join(f'{count} {kind}' for kind, count in self.ignored.items())}")
        return "; ".join(said)


def epoch_seed(seed: int, epoch: int, purpose: str = "") -> int:
    """Return 31 bits that depend on nothing but the arguments."""
    return zlib.crc32(f"{seed}/{epoch}/{purpose}".encode()) >> 1


def epoch_order(length: int, seed: int, epoch: int) -> torch.Tensor:
    """Return a permutation of ``range(length)`` that is a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch, "order"))
    return torch.randperm(length, generator=generator)


class EpochSampler(Sampler[int]):
    """Every example once, in a different order in each epoch.

    Args:
        length: Number of examples.
        seed: Seed of the run.

    Attributes:
        epoch: The epoch whose order comes next.
        start: Examples of that order that are left out, at its beginning.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.length, self.seed, self.epoch).tolist()[self.start :])
