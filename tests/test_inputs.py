"""What a model is called with: objects, mappings, named tuples, lists as one argument, sparse matrices."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.against_dense import armed, assert_dense_gradients
from trady.errors import ModelError
from trady.model.batch import Batch

X = torch.randn(6, 8, dtype=torch.float64)


@dataclasses.dataclass
class Graph:
    x: Tensor
    edges: Tensor


class Keyed(Graph):
    def keys(self) -> list[str]:
        return ["x", "edges"]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class Named(NamedTuple):
    x: Tensor
    scale: Tensor


class Nested:
    def __init__(self, x: Tensor) -> None:
        self.store: dict[str, Any] = {"x": x, "of": [x.sum(1)]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def core(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.first(x)))


class OfObject(Net):
    def forward(self, data: Any) -> Tensor:
        return self.core(data.x)


class OfNested(Net):
    def forward(self, data: Nested) -> Tensor:
        return self.core(data.store["x"]) * data.store["of"][0][:, None]


class OfMapping(Net):
    def forward(self, batch: Any) -> Tensor:
        return self.core(batch["x"])


class OfList(Net):
    def forward(self, given: list[Tensor]) -> Tensor:
        return self.core(torch.stack(given).mean(0))


class OfNames(Net):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.core(x) if scale is None else self.core(x) * scale


EDGES, SCALE = torch.zeros(2, 3, dtype=torch.long), torch.ones(6, 1, dtype=torch.float64)
CALLS: dict[str, tuple[type[Net], Any, bool]] = {
    "dataclass": (OfObject, Graph(X, EDGES), True),
    "with keys": (OfObject, Keyed(X, EDGES), True),
    "named tuple": (OfObject, Named(X, SCALE), True),
    "nested": (OfNested, Nested(X), True),
    "dict": (OfMapping, {"x": X}, True),
    "UserDict": (OfMapping, UserDict(x=X), True),
    "list": (OfList, [X, X + 1], True),
    "named arguments": (OfNames, {"x": X, "scale": SCALE}, False),
    "named tuple of arguments": (OfNames, Named(X, SCALE), False),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_an_example_of_any_form_is_what_the_model_is_called_with(name: str, wrapped: bool) -> None:
    kind, given, whole = CALLS[name]
    torch.manual_seed(0)
    model = kind().double()
    example = (given,) if wrapped and whole else given

    def run(model: nn.Module) -> Tensor:
        if whole:
            return model(given).square().sum()
        return (model(**given) if isinstance(given, dict) else model(*given)).square().sum()

    tuner = armed(model, example)
    assert_dense_gradients(model, tuner, run)
    ledger = tuner.ledger(lambda: run(model).backward())
    assert ledger.inference_peak_bytes is not None
    assert ledger.input_bytes >= X.nbytes
    tuner.finish()


def test_an_object_is_cut_and_measured_as_its_tensors_are() -> None:
    batch = Batch.of(Graph(X, EDGES))
    assert (batch.samples, batch.nbytes, batch.may_be_cut) == (6, X.nbytes + EDGES.nbytes, False)
    part = batch.chunk(2, 3).inputs
    assert type(part) is Graph
    assert torch.equal(part.x, X[2:5])
    assert part.edges is EDGES
    assert batch.meta.inputs.x.is_meta
    assert "Graph((6, 8) float64, (2, 3) int64)" in batch.shapes


def test_an_object_that_cannot_be_copied_is_refused_with_what_to_pass() -> None:
    class Stubborn(Graph):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    with pytest.raises(ModelError, match="tuple or a dict"):
        trady.plan(OfObject(), Stubborn(X.float(), EDGES), budget="elements:300")


class Convolves(nn.Module):
    """A graph network on an adjacency matrix."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.product = product

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.gelu(self.product(adjacency, self.first(x)))
        return self.head(F.gelu(self.product(adjacency, self.second(x))))


def _convolved(model: nn.Module, x: Tensor, adjacency: Tensor) -> Tensor:
    return model(x, adjacency).square().sum()


def _graph(nodes: int, edges: int, layout: torch.layout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(nodes)
    places = torch.randint(0, nodes, (2, edges), generator=generator)
    weights = torch.rand(edges, generator=generator, dtype=torch.float64)
    adjacency = torch.sparse_coo_tensor(places, weights, (nodes, nodes)).coalesce()
    x = torch.randn(nodes, 8, generator=generator, dtype=torch.float64)
    return x, adjacency if layout is torch.sparse_coo else adjacency.to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize(
    "product", [torch.sparse.mm, torch.matmul, lambda a, x: a @ x], ids=["sparse.mm", "matmul", "@"]
)
@pytest.mark.parametrize("recompute", ["all", "none"])
def test_a_sparse_matrix_is_multiplied_exactly(product: Any, layout: torch.layout, recompute: str) -> None:
    torch.manual_seed(0)
    model = Convolves(product).double()
    tuner = armed(model, _graph(20, 60, layout), recompute=recompute)
    for size in ((20, 60), (15, 30)):
        x, adjacency = _graph(*size, layout)
        assert_dense_gradients(model, tuner, partial(_convolved, x=x, adjacency=adjacency))
    tuner.finish()


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_graph_counts_what_it_stores_and_has_no_fewer_nodes_to_offer() -> None:
    x, adjacency = _graph(200, 300, torch.sparse_coo)
    batch = Batch.of((x, adjacency))
    stored = adjacency.values().numel()
    assert batch.nbytes == x.nbytes + stored * (8 + 2 * 8)
    assert not batch.may_be_cut
    with pytest.raises(trady.TradyError) as caught:
        trady.prepare(Convolves(torch.sparse.mm).double(), (x, adjacency), budget="peak:1 KiB", ranking="structural")
    assert "samples a step" not in str(caught.value)
    model = Convolves(torch.sparse.mm).double()
    tuner = trady.prepare(model, (x, adjacency), budget="peak:200 KiB", ranking="structural")
    peak = tuner.ledger(lambda: model(x, adjacency).square().sum().backward(), inference=False).peak_bytes
    assert peak <= 200 * 1024
    tuner.finish()


def test_activations_that_models_share_may_be_in_two_prepared_ones() -> None:
    class Activates(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.first, self.activation, self.head = nn.Linear(8, 16), activation, nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.activation(self.first(x)))

    shared = nn.GELU()
    models = [Activates(shared).double(), Activates(shared).double()]
    tuners = [armed(model, X) for model in models]
    for model, tuner in zip(models, tuners, strict=True):
        assert_dense_gradients(model, tuner, lambda model: model(X).square().sum())
    tuners[0].finish()
    assert_dense_gradients(models[1], tuners[1], lambda model: model(X).square().sum())
    tuners[1].finish()
