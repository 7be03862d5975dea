"""What transformers reads beside the weights of a run: the model's configuration, and how its inputs are prepared."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trady.training.data.datasets import Normalization

#: Pillow's number for bilinear resampling, in which a processor names it.
_BILINEAR = 2

#: Resizes the shorter side, crops the centre and normalises, each as its options say: nothing of it is CLIP's own.
_PROCESSOR = "CLIPImageProcessor"


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model is one of transformers, without importing it."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def configuration(model: Any, classes: Sequence[str]) -> dict[str, Any]:
    """Return ``config.json`` of a model of transformers, with the classes in it where each output has one.

    Args:
        model: A ``PreTrainedModel``; its own configuration stays as it is.
        classes: Names of the classes, in the order of the outputs.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if classes and getattr(config, "num_labels", None) == len(classes):
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    found: dict[str, Any] = config.to_diff_dict()
    key = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    found[key] = str(model.dtype).removeprefix("torch.")
    return found


def text_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Return what a tokenizer writes, and how a language model generates, by file name."""
    library = sys.modules["transformers"]
    with tempfile.TemporaryDirectory(prefix="trady-") as folder:
        tokenizer.save_pretrained(folder)
        if getattr(model, "can_generate", bool)():
            settings = model.generation_config
            if settings.pad_token_id is None:
                settings = library.GenerationConfig(**{**settings.to_dict(), "pad_token_id": tokenizer.pad_token_id})
            settings.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def image_processor(size: int, normalization: Normalization) -> dict[str, Any]:
    """Return ``preprocessor_config.json`` for images as a run takes them: the centre, resized, normalised.

    A square image comes out the same up to rounding. Of any other, transformers resizes before it crops, and trady
    crops first: pixels then differ by a part of a pixel's width.
    """
    mean, std = ([value / 255.0 for value in values] for values in (normalization.mean, normalization.std))
    channels = 3
    return {
        "image_processor_type": _PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean * (channels if len(mean) == 1 else 1),
        "image_std": std * (channels if len(std) == 1 else 1),
    }
