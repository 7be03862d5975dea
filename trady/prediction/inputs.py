"""What was typed after ``trady predict RUN``: photographs, folders and data sets, as one list of inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trady.errors import DataError
from trady.prediction.files import class_of, files_in, part_to_predict
from trady.training.data.identity import readable_names
from trady.training.data.npz import read_unlabelled
from trady.training.data.source import Reading, format_of, is_name


@dataclass
class Inputs:
    """Inputs in their order.

    Attributes:
        names: What predictions call them.
        sources: What is predicted: paths, or images as arrays.
        actual: The class that each is known to be of, by its folder or its label; ``None`` where it is not.
        remarks: What a person should know about how they were found.
    """

    names: list[str] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)
    actual: list[str | None] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, source: Any, actual: str | None) -> None:
        """Append one."""
        self.names.append(name)
        self.sources.append(source)
        self.actual.append(actual)


def find_inputs(given: Iterable[str], classes: Sequence[str], image_size: int) -> Inputs:
    """Find the inputs; images stay undecoded until their batch is due.

    Args:
        given: Image files; folders; data sets that trady reads, of which the evaluation part is taken.
        classes: Of the run; an input is labelled if its folder or its label is one of them.
        image_size: Of the run.

    Raises:
        DataError: Something is not there, or holds no image.
    """
    found = Inputs()
    for source in given:
        path = Path(source)
        if path.is_dir():
            _add_folder(found, path, classes)
        elif is_name(source) or source.endswith(".npz"):
            _add_data_set(found, source, classes, image_size)
        elif path.exists() or path.is_symlink():
            found.add(source, path, None)
        else:
            raise DataError(f"{source} does not exist; give image files, folders of images or a .npz file")
    return found


def _add_folder(found: Inputs, folder: Path, classes: Collection[str]) -> None:
    part = part_to_predict(folder)
    if part != folder:
        found.remarks.append(f"{folder} is a data set with parts: {part} is taken, which was not trained on")
    files = files_in(part)
    actual = [class_of(path, part, classes) for path in files]
    for path, label in zip(files, actual, strict=True):
        found.add(str(path), path, label)
    if any(actual) and not all(actual):
        others = sorted(
            {path.relative_to(part).parts[0] for path, label in zip(files, actual, strict=True) if not label}
        )
        shown = ", ".join(readable_names(others[:5])) + (", …" if len(others) > 5 else "")
        found.remarks.append(
            f"{actual.count(None)} of {len(files)} images in {part} are in no folder of a class of the run: {shown}"
        )


def _add_data_set(found: Inputs, source: str, classes: Collection[str], image_size: int) -> None:
    if source.endswith(".npz") and (pixels := read_unlabelled(source)) is not None:
        for number in range(len(pixels)):
            found.add(f"{source}[{number}]", pixels[number], None)
        return
    raw = format_of(source).read(source, Reading(image_size, "skip"))
    split = raw.train if raw.evaluation is None else raw.evaluation
    if raw.evaluation is not None:
        found.remarks.append(
            f"{source} is a data set with parts: the {len(split.labels)} images to evaluate on are taken"
        )
    names = readable_names(raw.classes)
    for number, label in enumerate(split.labels.tolist()):
        known = names[int(label)] if 0 <= label < len(names) else None
        found.add(f"{source}[{number}]", split.pixels[number], known if known in classes else None)
