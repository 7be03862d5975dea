"""What a trainer cannot have a budget with: one sentence before the first step, and nothing of it is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import trady
from benchmarks.trainers import scripts
from benchmarks.trainers.builds import plain
from benchmarks.trainers.checks import ASKED, quiet
from trady.errors import ModelError, StateError
from trady.integrations.refusals import refuse_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with quiet():
        yield


def face(trainer: Any) -> tuple[Any, ...]:
    """What could be changed of a trainer and its model."""
    model = trainer.model
    return (
        set(vars(trainer)), id(trainer.optimizer), len(trainer.callback_handler.callbacks), id(model),
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()],
        [(id(p), p.requires_grad, float(p.detach().sum())) for p in model.parameters()],
    )  # fmt: skip


def prepared(trainer: Any) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(2, dtype=torch.long)}
    trainer.kept = trady.prepare(trainer.model, batch, **ASKED)


def compiled(trainer: Any) -> None:
    trainer.model = torch.compile(trainer.model, backend="eager")


def wrapped(trainer: Any) -> None:
    trainer.model = nn.DataParallel(trainer.model)


def flagged(name: str) -> Any:
    return lambda trainer: setattr(trainer, name, True)


def several(trainer: Any) -> None:
    trainer.args._n_gpu = 2


BAD = {
    "prepared already": (prepared, StateError, r"is prepared already: call finish\(\)"),
    "compiled": (compiled, ModelError, "compiled already; take the model, and compile it later"),
    "wrapped": (wrapped, ModelError, "inside of DataParallel; take the model itself"),
    "FSDP": (flagged("is_fsdp_enabled"), ModelError, "FSDP; take plain or distributed data-parallel"),
    "DeepSpeed": (flagged("is_deepspeed_enabled"), ModelError, "DeepSpeed; take plain or distributed data-parallel"),
    "several GPUs": (several, ModelError, "DataParallel over several GPUs; take torchrun"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_when_it_is_tuned_and_when_it_trains(name: str, tmp_path: Path) -> None:
    spoil, error, said = BAD[name]
    made = plain(tmp_path, {"max_steps": 1})
    spoil(made)
    before = face(made)
    with pytest.raises(error, match=said) as refusal:
        trady.tune(made, **ASKED)
    assert "\n" not in str(refusal.value)
    assert face(made) == before
    # Tuned first and spoiled then: the model is as it was, and so is the optimizer.
    late = plain(tmp_path, {"max_steps": 1})
    trady.tune(late, **ASKED)
    spoil(late)
    before = face(late)
    with pytest.raises(error, match=said):
        late.train()
    assert face(late) == before


def test_a_model_in_shards_is_refused() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not there")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        mesh = DeviceMesh("cpu", [0])
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ModelError, match=r"a model in shards \(DTensor\); take the whole model"):
            refuse_model(model)
    finally:
        torch.distributed.destroy_process_group()
    refuse_model(nn.Linear(4, 4))


def lightning_fit(task: Any, callback: Any, *others: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*scripts.images(12)), batch_size=4)
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[callback, *others],
    ).fit(task, data)  # fmt: skip


def lightning_task(*, optimizer: bool = True) -> Any:
    pl = pytest.importorskip("lightning.pytorch")

    class Task(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = scripts.net()

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1) if optimizer else None

    return Task()


def test_lightning_refuses_a_model_that_is_prepared_compiled_exchanged_or_without_an_optimizer() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from trady.integrations.lightning import TradyCallback, _refuse

    task = lightning_task()
    tuner = trady.prepare(task.net, scripts.images(4)[0], **ASKED)
    with pytest.raises(StateError, match=r"is prepared already: call finish\(\)"):
        lightning_fit(task, TradyCallback(**ASKED))
    tuner.finish()
    with pytest.raises(ModelError, match="compiled already"):
        _refuse(SimpleNamespace(world_size=1), torch.compile(lightning_task(), backend="eager"), seen=True)
    with pytest.raises(ModelError, match=r"SimpleNamespace on 2 devices.*take strategy=\"ddp\", or devices=1"):
        _refuse(SimpleNamespace(world_size=2, strategy=SimpleNamespace()), task, seen=True)
    with pytest.raises(StateError, match="no optimizer of configure_optimizers"):
        lightning_fit(lightning_task(optimizer=False), TradyCallback(**ASKED))

    class Exchanges(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.net = scripts.net()

    exchanged = lightning_task()
    first = exchanged.net
    with pytest.raises(StateError, match="another model than the one that this run was armed for"):
        lightning_fit(exchanged, TradyCallback(**ASKED), Exchanges())
    assert all(not module._forward_pre_hooks for module in first.modules())
