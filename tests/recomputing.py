"""Models whose every segment is recomputed, held against the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import trady
from tests.against_dense import armed, dense_gradients, gradients
from tests.models import freeze_norms, relative_error
from trady.errors import ModelError


def anew(model: nn.Module, example: Any, **options: Any) -> trady.Tuner:
    """Every channel of every layer trains, every segment is recomputed."""
    return armed(model, example, **{"recompute": "all", **options})


def worst(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> float:
    """Relative error of the gradient that is furthest from the dense model's, and of the loss.

    A gradient that is nothing but rounding (that of queries and keys where a sentence has one token) is held against
    a millionth of the largest one instead of its own noise.
    """
    expected = dense_gradients(model, tuner, loss)
    dense = copy.deepcopy(model)
    freeze_norms(dense)
    with torch.no_grad():
        plain = loss(dense)
    for parameter in tuner.parameters():
        parameter.grad = None
    found_loss = loss(model)
    found_loss.backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    errors = [float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items()]
    return max(relative_error(found_loss, plain), *errors)


def close(name: str) -> float:
    """How near to the dense model: transformers computes the loss of language models in float32."""
    return 1e-6 if "loss" in name else 1e-10


def right_or_refused(
    model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor], *, refusable: bool
) -> None:
    """What takes another path than the example inside of a segment may be refused, and says what to do."""
    try:
        assert worst(model, tuner, loss) < 1e-10
    except ModelError as error:
        if not refusable:
            raise
        assert "prepare with an example of that kind" in str(error)  # noqa: PT017


def worst_of_few(model: nn.Module, tuner: trady.Tuner, loss: Callable[[nn.Module], Tensor]) -> float:
    """As :func:`worst`, for networks of a few layers."""
    expected = dense_gradients(model, tuner, loss)
    for parameter in tuner.parameters():
        parameter.grad = None
    loss(model).backward()
    found = gradients(tuner)
    assert found.keys() == expected.keys()
    assert expected
    return max(relative_error(found[n], g) for n, g in expected.items())


def four_layers() -> Iterator[nn.Linear]:
    return (nn.Linear(a, b) for a, b in ((8, 16), (16, 64), (64, 16), (16, 3)))
