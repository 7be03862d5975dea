"""Models that leave marks when they run: in flags, attributes, buffers, random numbers, or their own weights."""

from __future__ import annotations

import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import normal, seeded

WIDTH = 32
X, Y = normal(6, WIDTH), torch.arange(6) % 3
BATCHES = [(X[:4], Y[:4]), (X[2:], Y[2:])]


# -- models that leave marks ---------------------------------------------------------------------------


class Merging(nn.Linear):
    """An adapter that is added to the weight in evaluation mode, as loralib does it."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2) / 3)
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.up @ self.down
        elif not mode and not self.merged:
            self.weight.data += self.up @ self.down
        self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ self.down.t() @ self.up.t()


class Replacing(Merging):
    """Another one, which puts a new parameter there."""

    def train(self, mode: bool = True) -> Replacing:
        if mode == self.merged and self.is_worth_it():
            factor = -1.0 if mode else 1.0
            self.weight = nn.Parameter(self.weight.detach() + factor * (self.up @ self.down).detach())
            self.merged = not mode
        nn.Linear.train(self, mode)
        return self

    def is_worth_it(self) -> bool:
        return True


class Looking(Replacing):
    """One that looks at values, which tensors without memory do not have."""

    def is_worth_it(self) -> bool:
        return float(self.up.detach().abs().sum()) > 0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.shapes, self.kinds = 0, Counter[Any](), {"float"}
        self.recent: deque[int] = deque([7], maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes[x.shape] += 1
        self.kinds.add(str(x.shape))
        self.recent.append(self.calls)
        return x


class Caching(nn.Module):
    """Lists, nested dicts, and tensors among them."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.nested: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}, "order": OrderedDict(x=1, y=2)}
        self.by_shape: defaultdict[Any, list[int]] = defaultdict(list)
        self.inside = ([0], "in a tuple")
        self.total = torch.zeros(2)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.outputs.append(x.detach())
        self.nested["a"]["b"][1]["c"] += 1
        self.nested["a"]["b"].append(x.shape)
        self.nested["order"].move_to_end("x")
        self.nested["new"] = 1
        self.by_shape[x.shape].append(1)
        self.inside[0][0] += 1
        self.total.add_(1)
        self.last = x * 2  # with its graph
        if not hasattr(self, "scale"):
            self.scale = x.new_ones(WIDTH)
        return x * self.scale


class Statistics:
    def __init__(self) -> None:
        self.count, self.parent, self.inner = 0, self, SimpleNamespace(seen=[])

    def note(self, x: Tensor) -> None:
        self.count += 1
        self.inner.seen.append(x.shape)


class Slotted:
    __slots__ = ("__hidden", "count", "late")

    def __init__(self) -> None:
        self.count, self.__hidden = 0, 0

    def note(self) -> None:
        self.count, self.late, self.__hidden = self.count + 1, self.count, self.__hidden + 1


class WithObjects(nn.Module):
    """Objects of the user's own, one of them behind a hook and one behind a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics, self.slotted = Statistics(), Slotted()
        self.note_elsewhere = Statistics().note
        hook = Statistics()
        self.hooked = nn.Identity()
        self.hooked.register_forward_hook(lambda *_: None)
        self.hooked.register_forward_pre_hook(Noting(hook))
        self.unregistered = [nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        self.statistics.note(x)
        self.slotted.note()
        self.note_elsewhere(x)
        return self.unregistered[0](self.hooked(x))


class Noting:
    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.statistics.note(args[0])


class Buffers(nn.Module):
    """Buffers written to, replaced, and moved to other memory."""

    written: Tensor
    replaced: Tensor
    mean: Tensor
    moved: Tensor
    late: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("written", "replaced", "mean", "moved", "late"):
            self.register_buffer(name, None if name == "late" else torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.written.add_(1)
            self.replaced = self.replaced + 1
            self.mean.lerp_(x.mean(0), 0.1)
            self.moved.data = self.moved.data + 1
            self.late = x.mean(0)
            self.mean.t_()
        return x + self.mean


class Drawing(nn.Module):
    """Random numbers from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True)
        self.own = torch.Generator().manual_seed(3)
        self.python, self.numpy = random.Random(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.recurrent(x.unsqueeze(1))
        numbers = random.random() + np.random.rand() + self.python.random() + self.numpy.random()  # noqa: NPY002
        noise = torch.rand(WIDTH) + torch.rand(WIDTH, generator=self.own)
        return F.dropout(out.squeeze(1), 0.5, self.training) * numbers + noise


class Rescaling(nn.Module):
    """RWKV rescales its weights when it is first evaluated, and back, and notes that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rescaled = nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        if self.rescaled == self.training:
            with torch.no_grad():
                self.layer.weight.mul_(3.0 if self.training else 1 / 3)
            self.rescaled = not self.training
        return self.layer(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Merging(), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.one(x)))


class Switching(nn.Module):
    """What is global to PyTorch, and the batch."""

    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(torch.is_grad_enabled())
        return x.mul_(1.5)


class Uncopyable(nn.Module):
    """A lock, and functions that close over the module."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.calls, self.log = Lock(), 0, [0]

        def count() -> None:
            self.calls += 1
            self.log.append(self.calls)

        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        with self.lock.inner:
            self.count()
        return x


class Lock:
    """A lock that can be copied, since a simulation copies models."""

    def __init__(self) -> None:
        self.inner = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Lock:
        return Lock()


class Flagging(nn.Module):
    """Flags and gradients of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.loose = [torch.ones(WIDTH, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        self.layer.bias.requires_grad_(False)
        self.layer.weight.grad = None
        vars(self.layer.weight)["seen"] = True
        return self.layer(x * self.loose[0])


class Net(nn.Module):
    """A layer that can train, then what leaves marks, then another layer and the head."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(WIDTH, WIDTH), middle
        self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.middle(torch.relu(self.first(x))))))


def quantised(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    linear = lambda module, name: name.startswith("middle")  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), linear)
    return model


def with_gradients(model: Any) -> nn.Module:
    F.cross_entropy(model(X), Y).backward()
    assert model.middle.loose[0].grad is not None
    model.middle.layer.weight.grad = torch.ones(WIDTH, WIDTH)
    found: nn.Module = model
    return found


def plainly(middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: seeded(lambda: Net(middle()))


def has_run(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model that has left its marks already."""

    def built() -> nn.Module:
        model = build()
        model(X)
        return model

    return built


def deeper(build: Callable[[], nn.Module], change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    return lambda: change(build())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "an adapter, in training mode": plainly(Merging),
    "an adapter, merged": deeper(plainly(Merging), lambda m: m.eval()),
    "an adapter, merged and taken out": deeper(plainly(Merging), lambda m: m.eval().train()),
    "an adapter in a new parameter": plainly(Replacing),
    "an adapter in a new parameter, merged": deeper(plainly(Replacing), lambda m: m.eval()),
    "an adapter that looks at values": plainly(Looking),
    "counters": plainly(Counting),
    "caches": plainly(Caching),
    "caches with something in them": has_run(plainly(Caching)),
    "objects": plainly(WithObjects),
    "buffers": plainly(Buffers),
    "random numbers": plainly(Drawing),
    "rescaled weights": plainly(Rescaling),
    "rescaled weights, in evaluation mode": has_run(deeper(plainly(Rescaling), lambda m: m.eval())),
    "tied weights": plainly(Tied),
    "quantised": lambda: quantised(plainly(lambda: nn.Linear(WIDTH, WIDTH))()),
    "compiled": lambda: compiled(plainly(Counting)()),
    "compiled within": lambda: _compiled_within(plainly(Counting)()),
    "globals and the batch": plainly(Switching),
    "a lock and closures": plainly(Uncopyable),
    "flags and gradients": deeper(plainly(Flagging), with_gradients),
}


def compiled(model: nn.Module) -> nn.Module:
    found: Any = torch.compile(model, backend="eager")
    assert isinstance(found, nn.Module)
    return found


def _compiled_within(model: Any) -> nn.Module:
    model.middle.compile(backend="eager")
    found: nn.Module = model
    return found
