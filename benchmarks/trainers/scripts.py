"""Libraries whose loop is theirs or the user's own: Lightning, Accelerate, skorch, and scripts as timm has them."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trady
from benchmarks.trainers.checks import ASKED, Cell, difference, mask, quiet, weights_of

#: Runs a script; with ``plan`` as plain training of what that trains, else inside a budget. Returns model and plan.
Script = Callable[[str, Path, "trady.Plan | None", bool], tuple[nn.Module, trady.Plan]]

FEATURES = ("training", "accumulation", "clipping", "bf16", "evaluation", "best model", "resume", "several forwards")


class Net(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.block = nn.Conv2d(16, 24, 3, padding=1)
        self.last = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [N, 4] of images [N, 3, H, W]."""
        x = torch.relu(self.block(torch.relu(self.stem(x))))
        scores: Tensor = self.last(x.mean((2, 3)))
        return scores


def net() -> Net:
    """Always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, (x.mean((1, 2, 3)) * 40).long().remainder(4)


def lightning(feature: str, out: Path, plan: trady.Plan | None, again: bool) -> tuple[nn.Module, trady.Plan]:
    """Lightning's Trainer with a callback."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from trady.integrations.lightning import TradyCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(pl.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
        """What people write."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if feature == "several forwards":
                loss = loss + (self.net(x) - self.net(x.flip(-1))).square().mean()
            self.log("train", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("quality", -nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            kept = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(kept, lr=0.05, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images()), batch_size=4)
    task = Task()
    callbacks: list[Any] = []
    saving = ModelCheckpoint(
        dirpath=out, filename="{epoch}", save_top_k=-1, monitor="quality" if feature == "best model" else None,
        mode="min",
    )  # fmt: skip
    callbacks.append(saving)
    session = TradyCallback(**ASKED)
    if plan is None:
        callbacks.append(session)
    else:
        mask(task.net, plan)
    by_feature: dict[str, dict[str, Any]] = {
        "accumulation": {"accumulate_grad_batches": 2},
        "clipping": {"gradient_clip_val": 0.05},
        "bf16": {"precision": "bf16-mixed"},
    }
    options = by_feature.get(feature, {})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    evaluates = feature in ("evaluation", "best model")
    resumed = out.parent / "first" / "epoch=0.ckpt" if again else None
    trainer.fit(task, data, data if evaluates else None, ckpt_path=None if resumed is None else str(resumed))
    if feature == "best model":
        task.load_state_dict(torch.load(saving.best_model_path, weights_only=False)["state_dict"])
    made = session.plan if plan is None else plan
    assert made is not None
    return task.net, made


def accelerate(feature: str, out: Path, plan: trady.Plan | None, again: bool) -> tuple[nn.Module, trady.Plan]:
    """A loop on Accelerate; on resume, what is saved in one order of the lines is loaded in another."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # one process for all cells
    adds_up = 2 if feature == "accumulation" else 1
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=adds_up, mixed_precision="bf16" if feature == "bf16" else "no"
    )
    model: nn.Module = net()
    x, y = images()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    tuner = None
    options = {"accumulates": adds_up > 1, "calls_per_step": 3 if feature == "several forwards" else 1, **ASKED}
    if plan is not None:
        mask(model, plan)
    if again:  # Accelerate first
        model, optimizer = accelerator.prepare(model, optimizer)
    if plan is None:
        tuner = trady.prepare(model, x[:4], autocast=torch.bfloat16 if feature == "bf16" else None, **options)
        optimizer = tuner.attach(optimizer)
        accelerator.register_for_checkpointing(tuner)
    if not again:
        model, optimizer = accelerator.prepare(model, optimizer)
    best: tuple[float, dict[str, Tensor]] = (float("inf"), {})
    if again:
        accelerator.load_state(str(out.parent / "first" / "state"))
    for step in range(12 if again else 0, 24):
        if tuner is not None and step % 8 == 0 and not (again and step == 12):
            tuner.resample(step // 8)
        place = step % 8 * 4
        inputs, targets = x[place : place + 4], y[place : place + 4]
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            if feature == "several forwards":
                loss = loss + (model(inputs) - model(inputs.flip(-1))).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients and feature == "clipping":
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        if feature in ("evaluation", "best model"):
            with torch.no_grad():
                score = -float(nn.functional.cross_entropy(model(x), y))
            if feature == "best model" and score < best[0]:
                best = score, weights_of(model)
        if feature == "resume" and step == 11 and not again:
            accelerator.save_state(str(out / "state"))
    made = plan if tuner is None else tuner.plan
    assert made is not None
    if tuner is not None:
        tuner.finish()
    if best[1]:
        model.load_state_dict(best[1])
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), made


def skorch(feature: str, out: Path, plan: trady.Plan | None, again: bool) -> tuple[nn.Module, trady.Plan]:
    """A skorch net, whose optimizer is adopted when it is there."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback, GradientNormClipping

    x, y = images()
    clips = feature == "clipping"
    callbacks: list[Any] = [("clip", GradientNormClipping(0.05))] if clips and plan is not None else []
    split = None
    if feature == "evaluation":
        from skorch.dataset import ValidSplit

        split = ValidSplit(2)
    learner = NeuralNetClassifier(
        net(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, optimizer__momentum=0.9, lr=0.05,
        batch_size=4, max_epochs=3, train_split=split, callbacks=callbacks, verbose=0,
    )  # fmt: skip
    learner.initialize()
    if plan is not None:
        mask(learner.module_, plan)
        learner.partial_fit(x, y)
        return learner.module_, plan
    tuner = trady.prepare(learner.module_, x[:4], **ASKED)
    tuner.attach(learner.optimizer_)

    class Clip(Callback):  # type: ignore[misc, unused-ignore]
        """Its own callback clips named parameters, and channels have no names in a module."""

        def on_grad_computed(self, net: Any, **_: Any) -> None:
            nn.utils.clip_grad_norm_(net.module_.parameters(), 0.05)

    if clips:
        learner.callbacks_.append(("clip", Clip()))
    learner.partial_fit(x, y)
    made = tuner.plan
    tuner.finish()
    return learner.module_, made


def images_script(feature: str, out: Path, plan: trady.Plan | None, again: bool) -> tuple[nn.Module, trady.Plan]:
    """A script in the style of timm's and torchvision's: own loop, autocast, accumulation, a file to resume."""
    model, (x, y) = net(), images()
    if plan is not None:
        mask(model, plan)
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5)
    adds_up = 2 if feature == "accumulation" else 1
    narrow = torch.bfloat16 if feature == "bf16" else None
    tuner = None
    if plan is None:
        calls = 3 if feature == "several forwards" else 1
        tuner = trady.prepare(model, x[:4], autocast=narrow, accumulates=adds_up > 1, calls_per_step=calls, **ASKED)
        optimizer = tuner.attach(optimizer)
    start, best = 0, (float("inf"), dict[str, Tensor]())
    if again:
        saved = torch.load(out.parent / "first" / "last.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        assert tuner is not None
        tuner.load_state_dict(saved["tuner"])
        start = saved["step"]
    for step in range(start, 24):
        if tuner is not None and step % 8 == 0:
            tuner.resample(step // 8)
        place = step % 8 * 4
        inputs, targets = x[place : place + 4], y[place : place + 4]
        with torch.autocast("cpu", narrow) if narrow is not None else nullcontext():
            loss = nn.functional.cross_entropy(model(inputs), targets) / adds_up
            if feature == "several forwards":
                loss = loss + (model(inputs) - model(inputs.flip(-1))).square().mean()
        loss.backward()
        if (step + 1) % adds_up == 0:
            if feature == "clipping":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if feature in ("evaluation", "best model"):
            with torch.no_grad():
                score = -float(nn.functional.cross_entropy(model(x), y))
            if feature == "best model" and score < best[0]:
                best = score, weights_of(model)
        if feature == "resume" and step == 11 and not again and tuner is not None:
            saved = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                "tuner": tuner.state_dict(), "step": step + 1,
            }  # fmt: skip
            out.mkdir(parents=True, exist_ok=True)
            torch.save(saved, out / "last.pt")
    made = plan if tuner is None else tuner.plan
    assert made is not None
    if tuner is not None:
        tuner.finish()
    if best[1]:
        model.load_state_dict(best[1])
    return model, made


SCRIPTS: Mapping[str, Script] = {
    "Lightning": lightning,
    "Accelerate": accelerate,
    "skorch": skorch,
    "script of timm's or torchvision's kind": images_script,
}

LEFT_OUT: Mapping[tuple[str, str], str] = {
    ("skorch", "accumulation"): "it has none",
    ("skorch", "bf16"): "it has none",
    ("skorch", "best model"): "its checkpoints hold the module's weights, as of any module",
    ("skorch", "resume"): "its checkpoints hold no state of other objects: use trady.prepare in a loop of your own",
    ("skorch", "several forwards"): "it calls the module once a batch",
}


def cell(script: str, feature: str) -> Cell:
    """Run a script with a budget, and as plain training of the same tensors."""
    if (says := LEFT_OUT.get((script, feature))) is not None:
        return Cell(script, feature, says=says)
    with tempfile.TemporaryDirectory() as folder, quiet():
        warnings.simplefilter("ignore", UserWarning)
        run, out = SCRIPTS[script], Path(folder)
        before = weights_of(net())
        model, plan = run(feature, out / "first", None, False)
        found = whole = weights_of(model)
        if feature == "resume":
            found = weights_of(run(feature, out / "again", None, True)[0])
        compared = weights_of(run(feature, out / "plain", plan, False)[0])
        error = max(difference(found, compared), difference(found, whole))
        return Cell(script, feature, error, difference(found, before))
