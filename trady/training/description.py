"""What a run is, in one file of its folder: all that it takes to use its weights, and where they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from trady.errors import CheckpointError
from trady.records.files import write_json
from trady.records.reading import file_digest
from trady.records.schema import AtLeast, Natural, Positive
from trady.records.versioned import Format
from trady.training.data.datasets import Normalization
from trady.training.data.image_files import MOST_PIXELS
from trady.training.run_folder import DESCRIPTION, RunFolder
from trady.training.texts.description import TextsDescription

FORMAT = Format("trady-run", "description of a run", CheckpointError, "train again into another folder")

#: Runs that learn to tell classes of images apart; of others only the weights are described.
IMAGE_CLASSIFICATION = "image-classification"

#: Which weights of a run: after its last epoch, or after the one of the highest accuracy.
Which = Literal["last", "best"]


@dataclass(frozen=True)
class ModelDescription:
    """How the model is made again.

    Attributes:
        name: What the command line called it; ``None`` for a module that was made in Python. Of a run that went on from
            another one it is what that one's model was called, so that the other folder is not needed.
        kind: The class of the module, with its package.
        outputs: Class scores that it gives; ``None`` where that is not known.
        transformers: Whether ``config.json`` beside this file describes it.
        started_from: The run whose weights it began with.
    """

    name: str | None
    kind: str
    outputs: Positive | None = None
    transformers: bool = False
    started_from: str | None = None


@dataclass(frozen=True)
class ImagesDescription:
    """How the model takes its images.

    Attributes:
        size: Height and width.
        mean: Taken from each pixel, 0 to 255: one value a channel, or one for all.
        std: What is left is divided by this.
    """

    size: Positive
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalization(self) -> Normalization:
        """The normalization of a batch."""
        return Normalization(self.mean, self.std)


@dataclass(frozen=True)
class WeightsDescription:
    """A file of weights, once the run is finished.

    Attributes:
        file: Its name in the folder.
        epoch: The epoch that it is of, from 0.
        sha256: Of its content.
        changes_only: Whether it holds changed channels and the head, for the model that the run began with.
    """

    file: str
    epoch: Natural
    sha256: str
    changes_only: bool = False


@dataclass(frozen=True)
class RunDescription:
    """What ``run.json`` holds.

    Attributes:
        task: ``image-classification``, ``text-classification``, ``text-generation``, …; ``classification`` where what
            the model takes is not known.
        model: How the model is made again.
        classes: Names of the classes, in the order of the outputs; empty where the data had no names.
        images: How images are prepared; ``None`` where the data was no images that trady reads.
        weights: By which they are, ``last`` or ``best``; empty until the run is finished.
        epochs: Epochs of the run.
        precision: ``no`` or ``bf16``: of the forward passes.
        batch_size: Examples of a forward pass in evaluation; ``None`` where a loader of the user's own decided.
        policy: Name of the policy.
        budget: As text; ``None`` is no limit.
        ranking: Where the layer ranking comes from; empty where the policy uses none.
        seed: Of everything random, the new head included.
        device: Where it was trained.
        data: What the data was: its ``source`` as it was typed, and what is compared when a run is resumed.
        versions: Of the packages that the result depends on.
        command: The command line; ``None`` for a run of ``trady.finetune``.
        started: When it began, ISO 8601 with the offset from UTC.
        texts: How texts are read; ``None`` where the data was no texts that trady reads.
    """

    task: str
    model: ModelDescription
    classes: tuple[str, ...]
    images: ImagesDescription | None
    epochs: Positive
    weights: Mapping[str, WeightsDescription] = field(default_factory=dict)
    precision: Literal["no", "bf16"] = "no"
    batch_size: Annotated[int, AtLeast(1)] | None = None
    policy: str = ""
    budget: str | None = None
    ranking: str = ""
    seed: int = 0
    device: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] | None = None
    started: str = ""
    texts: TextsDescription | None = None

    def finished(self, folder: RunFolder, batch_size: int | None, epochs: int) -> RunDescription:
        """Return it with the files of weights that are in the folder, and the batches that were evaluated on.

        Args:
            folder: Of the run.
            batch_size: Examples of a forward pass in evaluation.
            epochs: How many were trained.
        """
        last = epochs - 1
        best = folder.best_epoch()
        found = {
            which: WeightsDescription(path.name, epoch, file_digest(path), path in (folder.delta, folder.best_delta))
            for which, epoch in (("last", last), ("best", best))
            if epoch is not None and (path := folder.weights_of(which)) is not None
        }
        return replace(self, weights=found, batch_size=batch_size, epochs=epochs)

    def write(self, folder: RunFolder) -> None:
        """Write ``run.json``."""
        write_json(folder.description, {**FORMAT.header(), **asdict(self)})


def is_run(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a described run in a folder."""
    return (Path(path) / DESCRIPTION).is_file()


def read_description(run: str | os.PathLike[str]) -> RunDescription:
    """Return the description of a run.

    Raises:
        CheckpointError: There is none, or it is damaged or of another version; the message says what to do.
    """
    folder = RunFolder(Path(run))
    if not folder.description.exists():
        raise CheckpointError(_nothing_there(folder))
    return FORMAT.load(folder.description, _checked)


def _checked(data: object) -> RunDescription:
    found = FORMAT.read(RunDescription, data)
    with FORMAT.reading():
        if (images := found.images) is not None:
            if images.size**2 > MOST_PIXELS:
                raise ValueError(f"images.size is {images.size}, and images have up to {MOST_PIXELS} pixels")
            if {len(images.mean), len(images.std)} - {1, 3} or 0.0 in images.std:
                raise ValueError("images.mean and images.std are not a number for each channel, or for all")
    return found


def _nothing_there(folder: RunFolder) -> str:
    path = folder.path
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "does not exist"
        near = nearest_run(path)
        meant = "give the folder that trady finetune --out names" if near is None else f"did you mean {near}?"
        return f"{path} {what}; {meant}"
    if any(each.exists() for each in (folder.plan, folder.result, *folder.weights)):
        return (
            f"{path} has no {DESCRIPTION}: it is of an earlier trady, which did not describe its model. Run its "
            "command again with --resume (resume=True): nothing is trained again, and the description is written"
        )
    runs = _runs_in(path)
    if runs:
        return f"{path} is no run folder, but holds some: {', '.join(str(path / name) for name in runs[:5])}"
    return f"{path} is no run folder: it has no {DESCRIPTION}; give the folder that trady finetune --out names"


def nearest_run(path: Path) -> Path | None:
    """Return the run beside a path whose name is most like it, if any is."""
    near = get_close_matches(path.name, _runs_in(path.parent), n=1)
    return path.parent / near[0] if near else None


def _runs_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if is_run(path))
    except OSError:
        return []
