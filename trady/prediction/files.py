"""The images among files and folders, and the class that a folder says they are of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from trady.errors import DataError
from trady.training.data.identity import readable_names
from trady.training.data.image_files import as_counted, ending_of, readable_suffixes
from trady.training.data.image_folder import EVALUATION, TRAIN, part_of


def files_in(folder: Path) -> list[Path]:
    """Return the image files below a folder, in the order in which training reads them; hidden ones are left out.

    Raises:
        DataError: There is none; the message says what there is.
    """
    try:
        everything = sorted(folder.rglob("*"))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    # A link to nowhere is an image that cannot be read; a pipe or a device would never end.
    shown = [path for path in everything if _is_shown(path.relative_to(folder).parts) and not path.is_dir()]
    suffixes = readable_suffixes()
    files = [path for path in shown if path.suffix.lower() in suffixes and (path.is_file() or not path.exists())]
    if not files:
        kinds = ", ".join(sorted(suffixes))
        if not shown:
            raise DataError(f"{folder} is empty: there is no image in it or below it ({kinds})")
        found = as_counted(Counter(map(ending_of, shown)))
        raise DataError(f"{folder} holds no image, but {found}; images that are read end in {kinds}")
    return files


def part_to_predict(folder: Path) -> Path:
    """Return the evaluation part of a data set with parts (``train/`` and ``val/``), else the folder itself."""
    evaluation = part_of(folder, EVALUATION)
    return evaluation if evaluation is not None and part_of(folder, TRAIN) is not None else folder


def class_of(path: Path, folder: Path, classes: Collection[str]) -> str | None:
    """Return the class that a file's place below a folder names: that of the first folder, as in training."""
    first = readable_names(path.relative_to(folder).parts[:1])
    return first[0] if len(path.relative_to(folder).parts) > 1 and first[0] in classes else None


def _is_shown(parts: tuple[str, ...]) -> bool:
    # What training leaves out: hidden files, and folders of classes that start with a dot or an underscore.
    return not any(part.startswith(".") for part in parts) and not (len(parts) > 1 and parts[0].startswith("_"))
