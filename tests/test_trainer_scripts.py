"""Lightning, Accelerate, skorch and scripts by hand end where plain training of the same tensors ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trady
from benchmarks.trainers import scripts
from benchmarks.trainers.__main__ import run
from benchmarks.trainers.checks import ASKED, BAR
from trady.errors import ModelError, StateError

pytestmark = pytest.mark.filterwarnings("ignore")

CELLS = [
    (script, feature)
    for script in scripts.SCRIPTS
    for feature in scripts.FEATURES
    if (script, feature) not in scripts.LEFT_OUT and feature != "training"
]


@pytest.mark.parametrize(("script", "feature"), CELLS)
def test_it_ends_where_plain_training_of_the_same_tensors_ends(script: str, feature: str) -> None:
    if script in ("Lightning", "skorch"):
        pytest.importorskip(script.lower())
    found = scripts.cell(script, feature)
    assert found.error is not None
    assert found.error <= BAR
    assert found.changed is not None
    assert found.changed > 1e-3


def test_the_command_shows_cells_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skorch")
    assert run(["--trainer", "skorch", "--feature", "training", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "2 cells, 1 run, 0 not as plain" in shown
    assert "it has none" in shown


def test_optimizer_state_of_other_channels_is_refused_and_says_what_to_load() -> None:
    def prepared(epoch: int) -> tuple[trady.Tuner, torch.optim.Optimizer]:
        model = scripts.net()
        tuner = trady.prepare(model, scripts.images()[0][:4], budget="elements:500", policy="dynamic-random")
        optimizer = tuner.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        tuner.resample(epoch)
        return tuner, optimizer

    def step(tuner: trady.Tuner, optimizer: torch.optim.Optimizer) -> None:
        x, y = scripts.images()
        nn.functional.cross_entropy(tuner.model(x[:4]), y[:4]).backward()
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer = prepared(3)
    step(first, optimizer)
    saved, beside = optimizer.state_dict(), first.state_dict()
    first.finish()
    second, optimizer = prepared(0)
    optimizer.load_state_dict(saved)
    with pytest.raises(StateError, match=r"register_for_checkpointing\(tuner\)"):
        step(second, optimizer)
    second.finish()
    for tuner_first in (True, False):
        third, optimizer = prepared(0)
        for part in (0, 1) if tuner_first else (1, 0):
            third.load_state_dict(beside) if part == 0 else optimizer.load_state_dict(saved)
        step(third, optimizer)
        third.finish()


def test_lightning_refuses_what_cannot_be(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from trady.integrations.lightning import TradyCallback

    class Task(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, *, automatic: bool = True) -> None:
            super().__init__()
            self.net = scripts.net()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)

    def fit(task: Any, *callbacks: Any) -> None:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*scripts.images(8)), batch_size=4)
        pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=list(callbacks), default_root_dir=tmp_path,
        ).fit(task, data)  # fmt: skip

    with pytest.raises(StateError, match="two TradyCallbacks"):
        fit(Task(), TradyCallback(**ASKED), _Other(**ASKED))
    with pytest.raises(ModelError, match="automatic_optimization=False"):
        fit(Task(automatic=False), TradyCallback(**ASKED))
    task = Task()
    with pytest.raises(StateError, match="no optimizer of configure_optimizers"):
        fit(task, TradyCallback(**ASKED))
    assert all(not module._forward_pre_hooks for module in task.modules())
    with pytest.raises(StateError, match="nothing was trained"):
        TradyCallback(**ASKED).delta()


def _Other(**options: Any) -> Any:
    from trady.integrations.lightning import TradyCallback

    class Other(TradyCallback):
        pass

    return Other(**options)
