"""What is alive between the phases of a training: what trains, its optimizer's state, and nothing else, in no cycle."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.alive import kept_by, objects, sizes
from tests.loops import Text, ids
from tests.models import Residual, normal, seeded
from tests.small_task import small_data, small_net
from trady.errors import TradyWarning
from trady.memory.live import LiveBytes
from trady.optim import SGD, AdamW

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.001),
    "sgd in backward": lambda parameters: SGD(parameters, lr=0.01),
    "adamw in backward": lambda parameters: AdamW(parameters, lr=0.001),
}


class Watch:
    """Counts the memory of tensors that have come since the watch began."""

    def __init__(self) -> None:
        self._live = LiveBytes()

    @contextmanager
    def phase(self, expected: Callable[[], list[Tensor]]) -> Iterator[None]:
        """Run a phase without the garbage collector; afterwards, what is expected to be alive is."""
        with self._live:
            yield
        there = sizes(objects())
        gc.collect()
        assert sizes(objects()) == there  # nothing was kept by a reference cycle alone
        wanted = sizes(expected())
        assert there == wanted
        # What autograd alone holds is no object of Python's.
        followed = {key: reference.storage for key, reference in self._live._references.items()}
        known = self._before | wanted.keys()
        assert not [s for key, s in followed.items() if key not in known and s.nbytes and s.device != "meta"]

    @contextmanager
    def begun(self) -> Iterator[Watch]:
        """Watch; tensors that are there already are no news."""
        gc.collect()
        self._before = set(sizes(objects()))
        gc.freeze()  # objects of before are not among those of the collector any more
        gc.disable()
        try:
            yield self
        finally:
            gc.enable()
            gc.unfreeze()


@pytest.mark.parametrize(
    ("build", "x", "policy", "optimizer", "options"),
    [
        (lambda: seeded(Residual), normal(4, 3, 17, 17), "dynamic-random", "adamw", {}),
        (lambda: seeded(Residual), normal(4, 3, 17, 17), "velocity", "momentum", {}),
        (lambda: seeded(Residual), normal(4, 3, 17, 17), "fisher", "sgd in backward", {}),
        (lambda: seeded(Residual), normal(4, 3, 17, 17), "head", "adamw in backward", {}),
        (Text, ids(16, 16), "trady", "adamw", {"recompute": "all"}),
        (Text, ids(16, 16), "trady", "adamw in backward", {"fidelity": "8bit"}),
        (Text, ids(16, 16), "trady+", "momentum", {"recompute": "none"}),
        (Text, ids(16, 16), "velocity", "sgd in backward", {"recompute": "all"}),
        (Text, ids(16, 16), "sparse outputs", "adamw", {}),
    ],
)
def test_between_the_phases_what_trains_is_alive_and_nothing_else(
    build: Callable[[], nn.Module], x: Tensor, policy: str, optimizer: str, options: dict[str, Any]
) -> None:
    model, labels = build(), torch.arange(len(x)) % 3
    policy = "medyate" if policy == "sparse outputs" else policy
    asked: dict[str, Any] = {"budget": "1500 KiB", "policy": policy, **options}
    trady.plan(model, x, **asked)  # tables of 8-bit activations are made once a process
    made: torch.optim.Optimizer | None = None
    tuner: trady.Tuner | None = None

    def kept() -> list[Tensor]:
        return [] if tuner is None else kept_by(tuner, made)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    with warnings.catch_warnings(), Watch().begun() as watch:
        warnings.simplefilter("ignore", TradyWarning)
        with watch.phase(kept):
            trady.plan(model, x, **asked)
        with watch.phase(kept):
            tuner = trady.prepare(model, x, **asked)
        with watch.phase(kept):
            made = tuner.attach(OPTIMIZERS[optimizer](tuner.parameters()))
        for epoch in range(2):
            if tuner.observation_due:
                with watch.phase(kept):
                    tuner.observe([(x, labels)], F.cross_entropy)
            with watch.phase(kept):
                tuner.resample(epoch)
            for _ in range(2):
                with watch.phase(kept):
                    loss_of(x, labels).backward()
                    made.step()
                    made.zero_grad()
            with watch.phase(kept):
                for inputs, targets, share in tuner.micro_batches(x, labels):
                    (loss_of(inputs, targets) * share).backward()
                    del inputs, targets
                made.step()
                made.zero_grad()
            with watch.phase(kept), torch.no_grad():
                model.eval()
                model(x)
                model.train()
            with watch.phase(kept):  # a pass whose graph is dropped, and one that fails
                loss_of(x, labels)
                with pytest.raises(ValueError, match="batch_size"):
                    loss_of(x, labels[:1])
        with watch.phase(kept):
            tuner.redraw()
        with watch.phase(kept):
            tuner.ledger(lambda: loss_of(x, labels).backward())
            made.zero_grad()
        with watch.phase(kept):
            tuner.state_dict(), made.state_dict(), tuner.delta()
        with watch.phase(lambda: [each for values in made.state.values() for each in values.values()]):  # type: ignore[union-attr]
            tuner.finish()
        with watch.phase(list):
            made.state.clear()
            tuner = made = None


@pytest.mark.parametrize("policy", ["dynamic-random", "velocity", "full"])
def test_a_run_leaves_the_model_and_nothing_else(policy: str, tmp_path: Path) -> None:
    train, evaluation, model = small_data(32, 0), small_data(16, 1), small_net()
    torch.optim.AdamW(small_net().parameters())  # the first one imports PyTorch's compiler, whose frames stay
    with Watch().begun() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore", TradyWarning)
        before = sizes(objects())
        with watch.phase(lambda: [tensor for tensor in objects() if tensor.untyped_storage()._cdata in before]):
            trady.finetune(
                model, train, evaluation, budget="1 MiB", policy=policy, epochs=2, batch_size=16, lr=0.01,
                out=tmp_path / "run", optimizer="adamw", progress=False,
            )  # fmt: skip
