"""A storage format, a data format or a source of models is one value and one registration; messages list it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trady
from trady.errors import DataError, ModelError
from trady.quantized import formats
from trady.quantized.formats import StorageFormat, Stored, register_format, stored_in
from trady.quantized.linear import layer_at
from trady.training.data import source as data_source
from trady.training.data.datasets import CENTERED, Normalization
from trady.training.data.load import check_source
from trady.training.data.source import DataFormat, RawData, RawSplit, Reading, register_data_format
from trady.training.models import source as model_source
from trady.training.models.load import LoadedModel, check_model, image_format, load_model
from trady.training.models.source import ModelSource, register_model_source


class Halves:
    """Integers [out, in] that stand for halves."""

    copies = 1

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @property
    def shape(self) -> torch.Size:
        return self._weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def dense(self) -> Tensor:
        return self._weight.float() / 2

    def tensors(self) -> list[Tensor]:
        return [self._weight]


def read_halves(module: nn.Module, weight: Tensor) -> Stored | None:
    return Halves(weight) if weight.dtype == torch.int16 else None


def test_a_storage_format_of_ones_own_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_formats", list(formats._formats))
    linear = nn.Linear(3, 2)
    linear.weight = nn.Parameter(torch.arange(6, dtype=torch.int16).view(2, 3), requires_grad=False)
    assert stored_in(linear) is None
    register_format(StorageFormat(read_halves))
    layer = layer_at(linear)
    assert layer is not None
    assert layer.dense().tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]
    assert stored_in(nn.Linear(3, 2)) is None


def read_dots(name: str, reading: Reading) -> RawData:
    pixels = np.full((10, reading.image_size, reading.image_size), 7, dtype=np.uint8)
    return RawData(RawSplit(pixels, np.arange(10) % 2), None, ("a", "b"))


def test_a_data_format_of_ones_own_is_read_and_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data_source, "_formats", list(data_source._formats))
    with pytest.raises(DataError, match=r"dots:10 does not exist; it reads Fashion-MNIST.*photos/\)$"):
        trady.load_data("dots:10", image_size=4)
    register_data_format(DataFormat("dots", "dots:N", lambda name: name.startswith("dots:"), read_dots, by_name=True))
    assert len(trady.load_data("dots:10", image_size=4).train) == 8
    check_source("dots:10")
    assert data_source.is_name("dots:10")
    assert not data_source.is_name(str(tmp_path))
    with pytest.raises(DataError, match=r"it reads Fashion-MNIST \(fashion-mnist\); .*; dots \(dots:N\)"):
        check_source(tmp_path / "nowhere")


def linear_model(name: str, classes: int) -> LoadedModel:
    return LoadedModel(nn.Sequential(nn.Flatten(), nn.LazyLinear(classes)), *linear_format(name))


def linear_format(name: str) -> tuple[Normalization, int]:
    return CENTERED, int(name.removeprefix("linear-"))


def test_a_source_of_models_of_ones_own_is_used_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = list(model_source._sources)  # the last of them takes every name
    monkeypatch.setattr(model_source, "_sources", [])
    mine = ModelSource(
        "linear-SIZE", lambda name: name.startswith("linear-"), linear_model, linear_format, linear_format
    )
    register_model_source(mine)
    for source in shipped:
        register_model_source(source)
    assert load_model("linear-8", 3).model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert image_format("linear-8") == (CENTERED, 8)
    check_model("linear-8")
    with pytest.raises(
        ModelError, match=r"there are linear-SIZE, a run folder, efficientnet-lite0, package\.module:function, "
    ):
        check_model("./nowhere")


def test_reading_the_size_of_a_models_images_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    image_format("tests.small_task:small_net")
    assert torch.equal(torch.get_rng_state(), before)
