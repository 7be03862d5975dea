"""Models of transformers: a folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from trady.errors import ModelError, ResourceError, TradyError
from trady.records.translated import in_our_words
from trady.training.data.datasets import CENTERED, Normalization
from trady.training.description import nearest_run
from trady.training.models.hub import offline_if_unreachable
from trady.training.models.source import LoadedModel, ModelSource, known_names, possible_models

#: More than any model has.
MOST_LAYERS = 2000

_EXAMPLES = "folders and Hub names that transformers can read"


def _load(name: str, num_classes: int) -> LoadedModel:
    transformers = import_transformers(name)
    with quiet(transformers), hub_errors(name):
        model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
            name, num_labels=num_classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
        normalization, image_size = preprocessing(transformers, name, model.config)
    return LoadedModel(model, normalization, image_size)


def import_transformers(name: str) -> Any:
    """Return the module.

    Raises:
        ModelError: It is not installed; ``name`` is what it was needed for.
    """
    try:
        import transformers
    except ImportError:
        raise ModelError(
            f"{name!r} is taken for a folder or a name on the Hugging Face Hub, which needs an extra: "
            f'pip install "trady[transformers]". Without it there are {possible_models(other_than=_EXAMPLES)}'
        ) from None
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Have transformers log errors only, and draw no bars."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def hub_errors(name: str, kind: str = "image model", there: str | None = None) -> Iterator[None]:
    """Turn what transformers and the Hub raise for a name into a ``ModelError`` that lists what can be named."""
    away = ""
    try:
        with offline_if_unreachable(name) as away:
            yield
    except TradyError:
        raise
    except Exception as error:  # whatever a configuration, weights or the network are like; no code of theirs is run
        if isinstance(lack := in_our_words(error), ResourceError):
            raise lack from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name!r} comes with Python code of its own, which trady never runs; load the model yourself, in a "
                "function, and give package.module:function"
            ) from error
        if away:
            raise ModelError(
                f"{name!r} is no folder here and is not in the cache of the Hugging Face Hub, which cannot be reached "
                f"({away}): look at the network or the proxy, or download the model elsewhere and give its folder. "
                f"Without the Hub there are {possible_models(other_than=_EXAMPLES)}"
            ) from error
        which = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ModelError(
            f"no {kind} {name!r}; there are {there or possible_models()}. The reason: {which}{error}"
        ) from error


def read_config(transformers: Any, name: str) -> Any:
    """Return a model's configuration; its own code, if it has any, is not run.

    Raises:
        ValueError: It asks for more layers than any model has, which would be built one after the other.
    """
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    for key, value in config.to_dict().items():
        if ("layer" in key or "depth" in key) and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"its configuration says {key} = {value}; no model has more than {MOST_LAYERS}")
    return config


def preprocessing(transformers: Any, name: str, config: Any) -> tuple[Normalization, int]:
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


def _matches(name: str) -> bool:
    return True


def _image_format(name: str) -> tuple[Normalization, int]:
    if not Path(name).exists() and (run := nearest_run(Path(name))) is not None:  # before the Hub is asked
        raise ModelError(f"no model {name!r}; did you mean {str(run)!r}?")
    transformers = import_transformers(name)
    with hub_errors(name):
        return preprocessing(transformers, name, read_config(transformers, name))


def _check(name: str) -> None:
    near = get_close_matches(name.lower(), known_names(), n=1)
    if near and not Path(name).exists():
        raise ModelError(f"no model {name!r}; did you mean {near[0]!r}?")
    _image_format(name)


TRANSFORMERS = ModelSource(_EXAMPLES, _matches, _load, _image_format, _check)
