"""A second derivative is refused where it would be wrong, and ``create_graph=True`` alone is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import trady
from benchmarks.habits.networks import Text, X, convolutions, images, perceptron, tokens
from trady.errors import StateError

BUILDS: list[tuple[Callable[[], nn.Module], Tensor]] = [(perceptron, X), (convolutions, images()), (Text, tokens(4, 8))]
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": Tensor.sum,  # the gradient of the output is a constant: PyTorch's own decorator would let it pass
    "square": lambda out: out.square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("head", ["auto", None])
@pytest.mark.parametrize(("build", "x"), BUILDS, ids=["perceptron", "convolutions", "text"])
def test_a_penalty_on_gradients_is_refused(
    build: Callable[[], nn.Module], x: Tensor, head: str | None, recompute: str, loss: str
) -> None:
    model = build()
    tuner = trady.prepare(model, x, budget="elements:100000", policy="full", head=head, recompute=recompute)
    parameters = list(tuner.parameters())
    first = torch.autograd.grad(LOSSES[loss](model(x)), parameters, create_graph=True, allow_unused=True)
    plain = torch.autograd.grad(LOSSES[loss](model(x)), parameters, allow_unused=True)
    for one, other in zip(first, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.detach(), other)
    penalty = torch.stack([gradient.square().sum() for gradient in first if gradient is not None]).sum()
    with pytest.raises(StateError, match=r"differentiated a second time \(create_graph=True.*plain copy of the model"):
        penalty.backward()
    tuner.finish()
