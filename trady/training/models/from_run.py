"""The model of a run: made again from what the run's folder says, with the weights that lie there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from trady.errors import CheckpointError, ModelError
from trady.model.eager import uncompiled_name
from trady.records.reading import file_digest
from trady.records.versioned import Format
from trady.training.data.datasets import Normalization
from trady.training.data.identity import readable_names
from trady.training.description import RunDescription, WeightsDescription, Which, is_run, read_description
from trady.training.models.from_transformers import hub_errors, import_transformers, quiet, read_config
from trady.training.models.source import LoadedModel, ModelSource, source_of
from trady.training.randomness import own_randomness
from trady.training.run_folder import RunFolder
from trady.tuner.delta import apply_delta

_WEIGHTS = Format(None, "file of weights", CheckpointError, "train again, or restore it")

#: Names in a message.
_SHOWN = 4


def load_trained(
    run: Path, which: Which, model: nn.Module | None = None
) -> tuple[nn.Module, RunDescription, WeightsDescription]:
    """Return the model of a run with its weights, what the run is, and which weights these are.

    Args:
        run: The run folder.
        which: The weights after the last epoch, or after the best one.
        model: The module, where the run began with one that was made in Python; its weights are replaced.

    Raises:
        CheckpointError: There is no run, or no such weights, or they are damaged.
        ModelError: The model cannot be made again, or the module is another one.
    """
    description = read_description(run)
    weights = _weights(run, description, which)
    if model is None:
        with own_randomness():
            torch.manual_seed(description.seed)
            model = _architecture(run, description, description.model.outputs)
    _put(model, run, weights)
    return model, description, weights


def new_head(run: str, classes: tuple[str, ...]) -> str | None:
    """Say why a model that goes on from a run gets a new head for these classes; ``None`` where it keeps the run's."""
    before, classes = read_description(run).classes, tuple(readable_names(classes))
    if before == classes:
        return None
    return f"a new head for {_listed(classes)}: the head of {run} is for {_listed(before)}"


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"{len(names)} classes ({shown})" if names else "classes without names"


def _weights(run: Path, description: RunDescription, which: Which) -> WeightsDescription:
    """Find the weights that are asked for, and check that they are those that the run has written."""
    folder = RunFolder(run)
    weights = description.weights.get(which)
    if not description.weights:  # not finished: only the best weights so far are there
        best = folder.best_epoch()
        here = "" if best is None else f", or take the best weights so far (of epoch {best + 1}): --weights best"
        if which == "last" or best is None:
            raise CheckpointError(f"{run} is not finished: go on with it by --resume{here}")
        path = folder.weights_of("best")
        assert path is not None
        return WeightsDescription(path.name, best, "", path == folder.best_delta)
    if weights is None:
        raise CheckpointError(f"{run} has kept no {which} weights; take --weights {next(iter(description.weights))}")
    path = run / Path(weights.file).name  # never outside of the folder
    if not path.exists():
        others = [name for name, other in description.weights.items() if (run / other.file).exists()]
        instead = f"take --weights {others[0]}, or restore" if others else "restore"
        raise CheckpointError(f"{path} is missing, the {which} weights of the run: {instead} it from a copy")
    try:
        same = file_digest(path) == weights.sha256
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not same:
        raise CheckpointError(
            f"{path} is not the file that the run has written: its SHA-256 is another one than {run} says. It is cut "
            "short or was replaced; restore it from a copy, or train again"
        )
    return weights


def _architecture(run: Path, description: RunDescription, outputs: int | None) -> nn.Module:
    """Make the model of a run again, with that many outputs; its weights are still to come."""
    known = description.model
    if known.transformers:
        return _of_transformers(run, outputs)
    if known.name is None:
        raise ModelError(
            f"{run} was trained from a module that was made in Python ({known.kind}), and holds its weights only: make "
            "that module again and give it, trady.load(run, model=module)"
        )
    if outputs is None:
        raise ModelError(f"{run} does not say how many classes its model has: give it, trady.load(run, model=module)")
    return source_of(known.name).load(known.name, outputs).model


def _of_transformers(run: Path, outputs: int | None) -> nn.Module:
    name = str(run)
    transformers = import_transformers(name)
    with quiet(transformers), hub_errors(name):
        config = read_config(transformers, name)
        kind = getattr(transformers, str((config.architectures or [""])[0]), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(f"its architecture is {config.architectures}, which is none of transformers")
        if outputs is not None and getattr(config, "num_labels", outputs) != outputs:
            config.num_labels = outputs
        wanted: Any = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
        model: nn.Module = kind(config)
        return model.to(wanted if isinstance(wanted, torch.dtype) else getattr(torch, str(wanted)))


def _put(model: nn.Module, run: Path, weights: WeightsDescription, new: Collection[str] = ()) -> None:
    """Write the weights of a run into its model; those of a new head stay as they are."""
    path = run / Path(weights.file).name
    if weights.changes_only:
        apply_delta(model, path)
        return
    tensors = _WEIGHTS.read_tensors(path)
    try:
        tied = RunFolder(run).tied(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    tensors |= {name: tensors[kept] for name, kept in tied.items() if kept in tensors}
    own = model.state_dict()
    names = {uncompiled_name(name): name for name in own}
    missing = [name for name in names if name not in tensors and name not in new]
    unexpected = [name for name in tensors if name not in names]
    others = [
        f"{name} is {list(own[names[name]].shape)}, in the run {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in names and name not in new and own[names[name]].shape != tensor.shape
    ]
    mistakes = [
        f"{what} {', '.join(found[:_SHOWN])}{', …' if len(found) > _SHOWN else ''}"
        for what, found in (("the run lacks", missing), ("the module lacks", unexpected), ("", others))
        if found
    ]
    if mistakes:
        raise ModelError(
            f"this {type(model).__name__} is not the model of {path}: {'; '.join(text.strip() for text in mistakes)}"
        )
    kept = {names[name]: tensor for name, tensor in tensors.items() if name not in new}
    model.load_state_dict(kept, strict=False)  # what is missing is a new head, as was checked


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def going_on(run: Path, outputs: int | None, *, same_head: bool) -> nn.Module:
    """Return the model of a run, to be trained further, with its head or with a new one for that many outputs."""
    description = read_description(run)
    weights = _weights(run, description, "last")
    before = description.model.outputs
    if weights.changes_only and not same_head:
        raise ModelError(
            f"{run} is stored quantised and has kept only what changed: it goes on with the classes that it has, "
            "and these are others"
        )
    if same_head:
        if weights.changes_only:  # upon what the run began with
            torch.manual_seed(description.seed)
        model = _architecture(run, description, before)
        _put(model, run, weights)
    else:
        assert outputs is not None
        model = _architecture(run, description, outputs)
        # The head is what depends on the number of classes.
        other = _architecture(run, description, outputs + 1 if before in (None, outputs) else before)
        now, then = _shapes(model), _shapes(other)
        _put(model, run, weights, {key for key, shape in now.items() if then.get(key) != shape})
    return model


def _load(name: str, num_classes: int) -> LoadedModel:
    model = going_on(Path(name), num_classes, same_head=read_description(name).model.outputs == num_classes)
    return LoadedModel(model, *_image_format(name))


def _for_classes(name: str, classes: tuple[str, ...]) -> LoadedModel:
    model = going_on(Path(name), len(classes), same_head=new_head(name, classes) is None)
    return LoadedModel(model, *_image_format(name))


def _image_format(name: str) -> tuple[Normalization, int]:
    description = read_description(name)
    images = description.images
    if description.texts is not None:
        raise ModelError(
            f"{name} is a run on texts, and the data are images: name a model of images, or a run on images"
        )
    if images is None:
        raise ModelError(f"{name} was not trained on images that trady reads; its model is for a loop of your own")
    return images.normalization, images.size


def _check(name: str) -> None:
    run = Path(name)
    description = read_description(run)
    _image_format(name)
    _weights(run, description, "last")
    if description.model.name is None and not description.model.transformers:
        _architecture(run, description, None)


RUN = ModelSource("a run folder", is_run, _load, _image_format, _check, for_classes=_for_classes)
