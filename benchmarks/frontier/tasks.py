"""The tasks of the frontier: a pretrained network, real data, and the blocks that the network is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from benchmarks.backbones import load_backbone
from benchmarks.tasks import seeded
from benchmarks.text import Sentences, pretrained_minilm, read_sentences, tokenize
from trady.errors import DataError
from trady.training.data.datasets import CENTERED, Normalization, epoch_order
from trady.training.data.load import load_data
from trady.training.models.load import EFFICIENTNET_LITE0, image_format, load_model

Kind = Literal["image", "text"]

#: Share of the training data on which learning rates are chosen.
HELD_OUT = 0.2

#: Where Debian's packages fortunes and fortunes-min put their files, and the categories that are told apart.
FORTUNES = Path("/usr/share/games/fortunes")
CATEGORIES = ("art", "computers", "men-women", "people", "politics", "science", "songs-poems", "work")


@dataclass(frozen=True)
class Folders:
    """Where models and data are.

    Attributes:
        models: Folder of the backbones; CIFAR-10 and SST-2 are in ``data`` beside it.
        fortunes: Folder of the fortune cookies.
    """

    models: Path
    fortunes: Path = FORTUNES

    @property
    def data(self) -> Path:
        """Return the folder of the data sets."""
        return self.models.parent / "data"


Data = tuple[Dataset[Any], Dataset[Any]]


@dataclass(frozen=True)
class FrontierTask:
    """One task.

    Attributes:
        name: What ``--task`` takes.
        describe: Network, data and length, for people.
        kind: What the network reads.
        model: Builds the network with its pretrained weights and a new head, the same every time.
        data: Reads the examples to train on and to judge by.
        blocks: The network's blocks in order of execution; whatever comes behind the last one belongs to the head.
        block_classes: Classes of the modules that checkpointing recomputes, where the model has no switch of its own.
        epochs: Passes over the training examples.
        batch_size: Examples a step.
    """

    name: str
    describe: str
    kind: Kind
    model: Callable[[Folders], nn.Module]
    data: Callable[[Folders], Data]
    blocks: Callable[[Any], list[nn.Module]]
    block_classes: tuple[str, ...]
    epochs: int
    batch_size: int = 32

    def split(self, folders: Folders, *, tune: bool) -> Data:
        """Return the examples to train on and to judge by; to tune, both are of the training data."""
        train, evaluation = self.data(folders)
        if not tune:
            return train, evaluation
        length = len(train)  # type: ignore[arg-type]
        order, cut = epoch_order(length, 0, 0).tolist(), round(HELD_OUT * length)
        return Subset(train, order[cut:]), Subset(train, order[:cut])


@lru_cache(maxsize=2)
def _images(source: str, size: int, train: int, evaluation: int, normalization: Normalization) -> Data:
    data = load_data(source, image_size=size, limit=(train, evaluation), normalization=normalization, seed=0)
    return data.train, data.evaluation


@lru_cache(maxsize=1)
def _sst2(folder: Path, length: int, count: int) -> Data:
    return read_sentences(folder / "train.tsv", length, count), read_sentences(folder / "test.tsv", length, None)


@lru_cache(maxsize=1)
def read_fortunes(folder: Path, length: int, train: int, evaluation: int) -> tuple[Sentences, Sentences]:
    """Read fortune cookies; the category is to be told from the text.

    Raises:
        DataError: A category is missing, or there are fewer cookies than are asked for.
    """
    texts, labels = [], []
    for label, category in enumerate(CATEGORIES):
        try:
            cookies = (folder / category).read_text(encoding="utf-8").split("\n%\n")
        except OSError as error:
            raise DataError(
                f"{folder / category}: {error.strerror or error}; on Debian and Ubuntu: sudo apt-get install fortunes "
                "fortunes-min, or name their folder with --fortunes"
            ) from error
        found = [" ".join(cookie.split()) for cookie in cookies]
        texts += [text for text in found if text]
        labels += [label] * sum(bool(text) for text in found)
    order = epoch_order(len(texts), 0, 0).tolist()
    if train + evaluation > len(order):
        raise DataError(f"{folder} has {len(order)} cookies of these categories; {train + evaluation} are needed")
    parts = [tokenize([texts[i] for i in chosen], torch.tensor([labels[i] for i in chosen]), length)
             for chosen in (order[:train], order[-evaluation:])]  # fmt: skip
    return parts[0], parts[1]


def _backbone(name: str, folders: Folders) -> nn.Module:
    return seeded(lambda: load_backbone(name, folders.models, num_classes=10))


def _efficientnet(folders: Folders) -> nn.Module:
    model: nn.Module = load_model(EFFICIENTNET_LITE0, 10, seed=0).model
    return model


def _bert_blocks(model: Any) -> list[nn.Module]:
    return list(model.bert.encoder.layer)


TASKS = {
    task.name: task
    for task in (
        FrontierTask(
            "cifar10",
            "MobileNetV2-w0.35 on CIFAR-10: 1500 images of 96 px, 4 epochs, 2000 to judge by",
            "image",
            lambda folders: _backbone("mbv2-w0.35", folders),
            lambda folders: _images(str(folders.data / "cifar10-12k.npz"), 96, 1500, 2000, CENTERED),
            lambda model: list(model.blocks),
            ("Block",),
            epochs=4,
        ),
        FrontierTask(
            "sst2",
            "MiniLM-L6 on SST-2: 1200 sentences of 48 tokens, 2 epochs, 872 to judge by",
            "text",
            lambda folders: pretrained_minilm({}),
            lambda folders: _sst2(folders.data / "sst2", 48, 1200),
            _bert_blocks,
            (),
            epochs=2,
        ),
        FrontierTask(
            "fashion-mnist",
            "EfficientNet-Lite0 on Fashion-MNIST: 1000 images of 64 px, 4 epochs, 2000 to judge by",
            "image",
            _efficientnet,
            lambda folders: _images("fashion-mnist", 64, 1000, 2000, image_format(EFFICIENTNET_LITE0)[0]),
            lambda model: list(model._blocks),
            ("MBConvBlock",),
            epochs=4,
        ),
        FrontierTask(
            "fortunes",
            "MiniLM-L6 on fortune cookies, 8 categories: 1600 texts of 48 tokens, 2 epochs, 1500 to judge by",
            "text",
            lambda folders: pretrained_minilm({"num_labels": len(CATEGORIES)}),
            lambda folders: read_fortunes(folders.fortunes, 48, 1600, 1500),
            _bert_blocks,
            (),
            epochs=2,
        ),
    )
}

__all__ = ["CATEGORIES", "FORTUNES", "TASKS", "Folders", "FrontierTask", "Sentences", "read_fortunes"]
