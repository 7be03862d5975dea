"""Batches that are looked at first are all trained on, and what draws random numbers stands where it stood."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import trady
from benchmarks.trainers.scripts import images, net
from trady.training.data.looking import first_of, to_be_looked_at

pytestmark = pytest.mark.filterwarnings("ignore")

#: One policy that looks at an example only, and one that measures gradients on several batches first.
POLICIES = ("dynamic-random", "medyate")


class OneShot(IterableDataset[Any]):
    """Samples that are there once: images whose first number counts them."""

    def __init__(self, count: int) -> None:
        self.read: list[int] = []
        x, y = images(count)
        x[:, 0, 0, 0] = torch.arange(count)
        self._samples = iter(list(zip(x, y, strict=True)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._samples:
            self.read.append(int(x[0, 0, 0]))
            yield x, y


class Counted(DataLoader[Any]):
    """Says how many batches there are."""

    def __len__(self) -> int:
        return 6


class Noisy:
    """A collator with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        x = torch.stack([sample[0] for sample in samples])
        return x + torch.rand(x.shape, generator=self.generator), torch.stack([sample[1] for sample in samples])


class Jittered(Dataset[Any]):
    """Data with a generator of its own."""

    def __init__(self, count: int) -> None:
        self.data, self.generator = TensorDataset(*images(count)), torch.Generator().manual_seed(2)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + torch.rand(x.shape, generator=self.generator), y


def seen_while(run: Callable[[nn.Module], object]) -> list[Tensor]:
    """Inputs of the forward passes whose graph a backward pass goes through."""
    model, trained = net(), []

    def remember(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            x = args[0].detach().clone()
            output.register_hook(lambda _: trained.append(x))

    model.register_forward_hook(remember)
    run(model)
    return trained


def finetune(train: Any, policy: str) -> Callable[[nn.Module], object]:
    held_out = TensorDataset(*images(8))
    budget = None if policy == "full" else "elements:3000"
    return lambda model: trady.finetune(
        model, train, held_out, budget=budget, epochs=1, out=None, policy=policy, progress=False, observed_batches=4
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_finetune_trains_on_all_samples_of_data_that_is_there_once(policy: str) -> None:
    data = OneShot(24)
    trained = seen_while(finetune(Counted(data, batch_size=4), policy))
    numbers = torch.cat([x[:, 0, 0, 0] for x in trained]).tolist()
    assert data.read == list(range(24))
    assert numbers[-24:] == list(range(24))  # before them, passes that measured gradients


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["collator", "data", "order"])
def test_finetune_trains_on_the_batches_that_it_trains_on_without_looking(policy: str, kind: str) -> None:
    def loader() -> DataLoader[Any]:
        torch.manual_seed(0)
        if kind == "collator":
            return DataLoader(TensorDataset(*images(24)), batch_size=4, collate_fn=Noisy())
        if kind == "data":
            return DataLoader(Jittered(24), batch_size=4)
        order = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(*images(24)), batch_size=4, shuffle=True, generator=order)

    plain = seen_while(finetune(loader(), "full"))
    looking = seen_while(finetune(loader(), policy))
    assert len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, looking[-6:], strict=True))


def test_batches_that_were_looked_at_come_again_once_and_are_let_go() -> None:
    batches = to_be_looked_at(Counted(OneShot(24), batch_size=4))
    numbers = [[int(n) for n in x[:, 0, 0, 0]] for x, _ in itertools.chain(first_of(batches, 1), first_of(batches, 3))]
    assert numbers == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [int(x[0, 0, 0, 0]) for x, _ in batches] == [0, 4, 8, 12, 16, 20]
    assert not list(batches)
    assert len(batches) == 6


def test_data_with_an_order_for_each_epoch_begins_again_when_it_is_told_the_epoch() -> None:
    class Ordered(IterableDataset[Any]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter(range(10 * self.epoch, 10 * self.epoch + 4))

    from trady.training.data.loaders import start_epoch

    batches = to_be_looked_at(DataLoader(Ordered(), batch_size=2))
    assert [batch.tolist() for batch in first_of(batches, 1)] == [[0, 1]]
    start_epoch(batches, 2)
    assert [batch.tolist() for batch in batches] == [[20, 21], [22, 23]]


def test_lightning_trains_on_all_batches_of_data_that_is_there_once() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from trady.integrations.lightning import TradyCallback

    collator = Noisy()
    trained: list[Tensor] = []

    class Task(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            out = self.net(batch[0])
            if out.requires_grad:
                x = batch[0].detach().clone()
                out.register_hook(lambda _: trained.append(x))
            return F.cross_entropy(out, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(data: DataLoader[Any], *callbacks: Any) -> list[Tensor]:
        trained.clear()
        pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=list(callbacks),
        ).fit(Task(), data)  # fmt: skip
        return list(trained)

    budget = TradyCallback(budget="elements:3000", policy="dynamic-random")
    data = OneShot(24)
    found = fit(DataLoader(data, batch_size=4), budget)
    assert torch.cat([x[:, 0, 0, 0] for x in found]).tolist() == data.read == list(range(24))
    plain = fit(DataLoader(TensorDataset(*images(24)), batch_size=4, collate_fn=Noisy()))
    budget = TradyCallback(budget="elements:3000", policy="dynamic-random")
    tuned = fit(DataLoader(TensorDataset(*images(24)), batch_size=4, collate_fn=collator), budget)
    assert len(plain) == len(tuned) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, tuned, strict=True))


def test_skorch_trains_on_all_batches_of_data_that_is_there_once() -> None:
    skorch = pytest.importorskip("skorch")
    trained: list[Tensor] = []
    data = OneShot(24)
    x, _ = images(4)
    learner = skorch.NeuralNetClassifier(
        net(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=0.01, batch_size=4, max_epochs=1,
        train_split=None, verbose=0,
    )  # fmt: skip
    learner.initialize()
    tuner = trady.prepare(learner.module_, x, budget="elements:3000", policy="dynamic-random")
    tuner.attach(learner.optimizer_)
    learner.module_.register_forward_hook(lambda _, args, out: trained.append(args[0].clone()))
    learner.partial_fit(data)
    tuner.finish()
    assert torch.cat([x[:, 0, 0, 0] for x in trained]).tolist() == data.read == list(range(24))
