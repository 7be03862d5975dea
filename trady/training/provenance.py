"""What a run is and where it comes from, put down before its first step and once more when it is finished."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from trady.errors import CheckpointError, StateError
from trady.model.eager import unwrap_compiled
from trady.records.files import write_bytes, write_json, write_lines
from trady.records.version import __version__
from trady.training.data.augment import as_it_is
from trady.training.data.datasets import ImageDataset
from trady.training.data.identity import readable_names
from trady.training.description import (
    IMAGE_CLASSIFICATION,
    ImagesDescription,
    ModelDescription,
    RunDescription,
    is_run,
    read_description,
)
from trady.training.models.transformers_files import configuration, image_processor, is_of_transformers, text_files
from trady.training.run_folder import CONFIG, PROCESSOR, RunFolder
from trady.training.settings import Settings
from trady.training.texts.dataset import TextDataset

#: What the result of a run depends on, beside Python, PyTorch and trady.
_PACKAGES = ("accelerate", "numpy", "pillow", "safetensors")


@dataclass(frozen=True)
class Origin:
    """What a person typed.

    Attributes:
        model: The model, as it was named; ``None`` for a module made in Python.
        data: The data set, as it was named.
        command: The command line.
        options: All options of the command, in TOML; a run that began has them in its folder.
    """

    model: str | None = None
    data: str | None = None
    command: tuple[str, ...] | None = None
    options: str | None = None


#: Nobody typed anything.
UNTOLD = Origin()


@dataclass
class Describer:
    """Writes what a run is into its folder.

    Attributes:
        description: As far as it is known before the run begins.
        files: What transformers reads beside it, by file name.
        options: Those of the command line, in TOML.
    """

    description: RunDescription
    files: Mapping[str, Mapping[str, Any] | bytes]
    options: str | None = None

    def begin(self, folder: RunFolder, plan: Mapping[str, Any] | None) -> None:
        """Describe the run before its first step, or the one that is resumed.

        Args:
            folder: Of the run.
            plan: What was decided; ``None`` for a run that is resumed, which keeps what it was started by.

        Raises:
            StateError: A file of that name is there that no run has written.
        """
        if plan is None:
            self._keep_origin(folder)
        else:
            self.description = replace(self.description, ranking=_ranking(plan))
        taken = [name for name in self.files if (folder.path / name).exists()]
        if taken and not folder.description.exists():
            raise StateError(
                f"{folder.path} holds {' and '.join(taken)} of another model, which the run would replace; name "
                "another folder for the run"
            )
        self.description.write(folder)
        if self.options is not None:
            write_lines(folder.options, self.options.splitlines())
        for name, content in self.files.items():
            if isinstance(content, bytes):
                write_bytes(folder.path / name, content)
            else:
                write_json(folder.path / name, content)

    def end(self, folder: RunFolder, plan: Mapping[str, Any], batch_size: int | None, epochs: int) -> None:
        """Describe the finished run: its weights, in what batches it was evaluated, and how many epochs it had."""
        batch_size = batch_size or self.description.batch_size
        replace(self.description, ranking=_ranking(plan)).finished(folder, batch_size, epochs).write(folder)

    def _keep_origin(self, folder: RunFolder) -> None:
        try:
            before = read_description(folder.path)
        except CheckpointError:  # of a trady that wrote none
            return
        model = before.model if self.description.model.name is None else self.description.model
        self.description = replace(
            self.description,
            model=model,
            ranking=before.ranking,
            batch_size=before.batch_size,
            command=before.command,
            started=before.started,
            data={**self.description.data, "source": before.data.get("source")},
        )


def describe(
    model: nn.Module,
    train: Any,
    settings: Settings,
    origin: Origin,
    device: torch.device,
    identity: Mapping[str, Any],
) -> Describer:
    """Say what a run is.

    Args:
        model: The model, untouched.
        train: The data that it is trained on, or a loader of it.
        settings: Of the run.
        origin: What was typed.
        device: Where it trains.
        identity: Of the data (:func:`trady.training.data.identity.identity`).
    """
    plain = unwrap_compiled(model)
    data = _whole(train)
    images = None
    if isinstance(data, ImageDataset):
        images = ImagesDescription(data.image_size, data.normalization.mean, data.normalization.std)
    classes = _classes(data)
    texts = data.description if isinstance(data, TextDataset) else None
    files: dict[str, Mapping[str, Any] | bytes] = {}
    if of_transformers := is_of_transformers(plain):
        files[CONFIG] = configuration(plain, classes)
        if images is not None:
            files[PROCESSOR] = image_processor(images.size, images.normalization)
        if isinstance(data, TextDataset):
            files.update(text_files(plain, data.tokenizer))
    name, started_from = origin.model, None
    if name is not None and is_run(name):
        name, started_from = read_description(name).model.name, name
    outputs = getattr(getattr(plain, "config", None), "num_labels", None) if of_transformers else len(classes) or None
    if texts is not None and texts.task == "language-model":
        outputs = None
    task = IMAGE_CLASSIFICATION if images is not None else "classification" if texts is None else texts.name
    description = RunDescription(
        task=task,
        model=ModelDescription(
            name, f"{type(plain).__module__}.{type(plain).__qualname__}", outputs, of_transformers, started_from
        ),
        classes=classes,
        images=images,
        texts=texts,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        precision="bf16" if settings.mixed_precision == "bf16" else "no",
        policy=settings.policy,
        budget=settings.budget,
        seed=settings.seed,
        device=_device(device),
        data={"source": origin.data, **{key: value for key, value in identity.items() if not isinstance(value, list)}},
        versions=_versions(of_transformers),
        command=origin.command,
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    return Describer(description, files, origin.options)


def _whole(data: Any) -> Any:
    """Return the data set behind loaders, augmentation and subsets."""
    data = data.dataset if isinstance(data, DataLoader) else data
    data = as_it_is(data)
    return _whole(data.dataset) if isinstance(data, Subset) else data


def _classes(data: Any) -> tuple[str, ...]:
    try:
        found = getattr(data, "classes", None)
    except Exception:  # a property of somebody's own
        return ()
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        return ()
    return tuple(readable_names(found))


def _ranking(plan: Mapping[str, Any]) -> str:
    where, on = plan.get("ranking") or "none", plan.get("measured_on")
    if where == "none":
        return ""
    return f"{where} ({on})" if on else str(where)


def _device(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})" if name else device.type


def _versions(of_transformers: bool) -> dict[str, str]:
    found = {"trady": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in (*_PACKAGES, *(("transformers",) if of_transformers else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
