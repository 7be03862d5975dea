"""What transformers reads beside the weights of a run: the model's configuration and how its images are prepared."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
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
