"""Folders of images, one subfolder a class (the ImageFolder layout)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from trady.errors import DataError
from trady.training.data.decoding import Decoded, decode
from trady.training.data.identity import readable_names
from trady.training.data.image_files import as_counted, ending_of, named, readable_suffixes
from trady.training.data.source import DataFormat, RawData, RawSplit, Reading

TRAIN = ("train", "training")

EVALUATION = ("val", "valid", "validation", "test")

#: Names in a message.
_SHOWN = 5

Files = list[tuple[Path, int]]


def matches(name: str) -> bool:
    """Return whether ``name`` means a folder of images."""
    return Path(name).is_dir()


def part_of(top: Path, names: Iterable[str]) -> Path | None:
    """Return the first part of a data set that is there, in capitals or not: ``val``, ``VAL``, ``Test``."""
    try:
        there = {path.name.lower(): path for path in sorted(top.iterdir(), reverse=True) if path.is_dir()}
    except OSError as error:
        raise DataError(f"{top} cannot be read: {error.strerror or error}") from error
    return next((there[name] for name in names if name in there), None)


def read(name: str, reading: Reading) -> RawData:
    """Decode every image once, cropped to a square and resized.

    Raises:
        DataError: There are no two classes with an image each to train on, or images cannot be read; the message names
            all of them.
    """
    top = Path(name)
    train, evaluation = part_of(top, TRAIN), part_of(top, EVALUATION)
    if train is None and evaluation is not None:
        raise DataError(
            f"{top} has {evaluation.name}/ but no train/ beside it: name the other part train/, or put the classes "
            f"into {top} itself, and a fifth of their images is held out"
        )
    found = _Found()
    classes = _classes(train or top)
    files = found.files(train or top, classes)
    to_evaluate = None if evaluation is None else found.files(evaluation, classes, foreign=_classes(evaluation))
    found.check(train or top, classes, files)
    split = _split(decode(files, reading, found.skipped, "train", top), train or top, classes)
    held_out = None
    if to_evaluate is not None:
        held_out = decode(to_evaluate, reading, found.skipped, "evaluation", top).split
    return RawData(split, held_out, classes, tuple(found.skipped), named(found.ignored))


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    if not classes:
        raise DataError(f"{folder} has no subfolders; expected one a class with its images in it")
    return classes


class _Found:
    """What lies in the folders of classes.

    Attributes:
        skipped: Pipes, devices and sockets, which never end, and later images that cannot be read.
        ignored: How many files of other kinds there are, by their ending.
    """

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.ignored: Counter[str] = Counter()
        self._ignored_of: dict[str, Counter[str]] = {}

    def files(self, folder: Path, classes: Sequence[str], foreign: Sequence[str] = ()) -> Files:
        """Return the image files of a part and their labels.

        Raises:
            DataError: It has none, or classes that training has not.
        """
        if others := sorted(set(foreign) - set(classes)):
            raise DataError(
                f"{folder} has classes that there are no images of to train on: {_some(others)}. Add a folder of each "
                "to the other part, or remove them here"
            )
        suffixes, files = readable_suffixes(), []
        self._loose(folder, suffixes)
        for label, name in enumerate(classes):
            ignored: Counter[str] = Counter()
            for path in sorted((folder / name).rglob("*")):
                if path.name[0] == "." or path.is_dir():
                    continue
                if path.suffix.lower() not in suffixes:
                    ignored[ending_of(path)] += 1
                elif path.exists() and not path.is_file():
                    self.skipped.append(str(path))
                else:  # a link to nowhere is an image that cannot be read
                    files.append((path, label))
            self.ignored += ignored
            self._ignored_of[name] = self._ignored_of.get(name, Counter()) + ignored
        if not files:
            raise DataError(f"{folder} has {len(classes)} class folders but no image in them{self._why(self.ignored)}")
        return files

    def check(self, folder: Path, classes: Sequence[str], files: Files) -> None:
        """Refuse to train on a single class, or on classes without images.

        Raises:
            DataError: They are named, with what to do.
        """
        if len(classes) == 1:
            raise DataError(
                f"{folder} has one class, {_some(classes)}: telling images apart takes two, in a folder each"
            )
        counts = Counter(label for _, label in files)
        if empty := [name for label, name in enumerate(classes) if not counts[label]]:
            ignored: Counter[str] = Counter()
            for name in empty:
                ignored += self._ignored_of.get(name, Counter())
            raise DataError(
                f"{folder} has no images of {len(empty)} of {len(classes)} classes: {_some(empty)}{self._why(ignored)}"
                ". Put images there, or remove these folders"
            )

    def _loose(self, folder: Path, suffixes: Iterable[str]) -> None:
        loose = sum(path.suffix.lower() in suffixes and path.name[0] != "." for path in folder.iterdir())
        if loose:
            self.ignored[f"image{'s' if loose > 1 else ''} in no class folder"] += loose

    @staticmethod
    def _why(ignored: Counter[str]) -> str:
        return f", but {as_counted(ignored)}" if ignored else ""


def _split(decoded: Decoded, folder: Path, classes: Sequence[str]) -> RawSplit:
    """Return what can be trained on.

    Raises:
        DataError: No image of a class could be read.
    """
    there = set(decoded.split.labels.tolist())
    if lost := [name for label, name in enumerate(classes) if label not in there]:
        raise DataError(
            f"no image of {_some(lost)} in {folder} can be read, e.g. {decoded.first_of(classes.index(lost[0]))}: mend "
            "them, or remove these folders"
        )
    return decoded.split


def _some(names: Sequence[str]) -> str:
    shown = readable_names(names[:_SHOWN])
    return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")


IMAGE_FOLDER = DataFormat("a folder of images", "photos/", matches, read)
