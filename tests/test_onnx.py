"""``torch.onnx.export`` of a prepared model writes the plain one, and training goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import trady
from benchmarks.habits.networks import convolutions, images, sgd

pytest.importorskip("onnxscript")
reference = pytest.importorskip("onnx.reference")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Exporting a model"
)


def computed(program: Any, x: Tensor) -> Tensor:
    """What ONNX's own evaluator makes of a program."""
    model = program.model_proto
    (found,) = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(found))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "no_grad"])
def test_an_armed_model_is_exported_as_the_plain_one(gradients: bool, training: bool) -> None:
    model, x, y = convolutions().float(), images().float(), torch.arange(4) % 3
    tuner = trady.prepare(model, x, budget="elements:600", policy="static-random", recompute="all")
    optimizer = tuner.attach(sgd(model.parameters()))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model.train(training)
    with torch.no_grad():
        expected = model(x)
    with torch.set_grad_enabled(gradients):
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    torch.testing.assert_close(computed(program, x), expected, rtol=1e-4, atol=1e-5)
    weight = next(each for each in program.model_proto.graph.initializer if each.name == "0.weight")
    assert list(weight.dims) == list(model.get_parameter("0.weight").shape), "the whole weight, not its channels"
    model.train()
    step()
    with torch.no_grad():
        assert not torch.equal(model(x), expected), "training has gone on"
    tuner.finish()
