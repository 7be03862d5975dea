"""What a run folder keeps: of the run before, of the best epoch, of what the data was; and whom it lets in."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from tests.command import MODEL, start, trady_here
from tests.small_runs import lines, run
from tests.small_task import StopAfter, small_data, small_net, write_npz
from trady.errors import CheckpointError, LockedError, ResourceError, StateError, TrainingError
from trady.records.lock import locked
from trady.records.tensors import write_safetensors
from trady.training import checkpoint, saver
from trady.training.checkpoint import DESCRIPTION, TENSORS, find_checkpoint, load_checkpoint, save_checkpoint
from trady.training.data import identity as identities
from trady.training.data.datasets import CENTERED, IMAGENET, ImageDataset
from trady.training.data.identity import identity
from trady.training.data.load import load_data
from trady.training.metrics import EpochMetrics
from trady.training.objective import Evaluated
from trady.training.progress import Silent
from trady.training.run_folder import RunFolder

PARTS = ("training", "evaluation")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- one at a time ---------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    run(tmp_path, policy="full", epochs=1)
    before = contents(tmp_path)
    with locked(tmp_path), pytest.raises(LockedError, match="in use by process"):
        run(tmp_path, policy="full", epochs=1, resume=True)
    assert contents(tmp_path) == before
    data = write_npz(tmp_path / "data.npz")
    with locked(tmp_path):
        shown = trady_here("finetune", MODEL, data, "--policy", "full", "--out", tmp_path, "--resume")
    assert shown.returncode == 2
    assert f"{tmp_path} is in use by process" in shown.stderr


def test_of_two_resumers_one_trains_and_the_other_is_told_who_does(tmp_path: Path) -> None:
    data, out = write_npz(tmp_path / "data.npz"), tmp_path / "run"
    arguments = ["finetune", MODEL, data, "--policy", "full", "--image-size", "12",
                 "--batch-size", "8", "--out", out, "--epochs", "60", "--resume"]  # fmt: skip
    both: list[subprocess.Popen[str]] = [start(*arguments), start(*arguments)]
    said = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    if codes == [0, 0]:  # one began when the other had ended
        pytest.skip("the machine ran one after the other")
    assert sorted(codes) == [0, 2]
    assert f"in use by process {both[codes.index(0)].pid} on " in said[codes.index(2)]
    assert [line["epoch"] for line in lines(out)] == list(range(60))


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        run(tmp_path / "new", policy="full", lr=1e30, max_grad_norm=None, warmup_epochs=0)
    assert not any(path.name.startswith(".") for path in (tmp_path / "new").iterdir())


# -- nothing is removed before something better exists -----------------------------------------------------


def test_a_finished_run_without_its_checkpoint_is_not_resumed_and_keeps_everything(tmp_path: Path) -> None:
    run(tmp_path, policy="full", epochs=1)
    shutil.rmtree(tmp_path / "checkpoint")
    before = contents(tmp_path)
    with pytest.raises(StateError, match=r"has result.json, model.safetensors, best.safetensors but no checkpoint"):
        run(tmp_path, policy="full", epochs=1, resume=True)
    (tmp_path / "result.json").unlink()
    with pytest.raises(StateError, match=r"has model.safetensors, best.safetensors but no checkpoint.*--overwrite"):
        run(tmp_path, policy="full", epochs=1, resume=True)
    with pytest.raises(StateError, match="holds a run already"):
        run(tmp_path, policy="full", epochs=1)
    assert contents(tmp_path) == {name: value for name, value in before.items() if name != "result.json"}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_is_overwritten_comes_back_if_the_new_one_gets_nowhere(tmp_path: Path, finished: bool) -> None:
    if finished:
        run(tmp_path, policy="full", epochs=2)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, policy="full", epochs=2, progress=StopAfter(1))
    before = contents(tmp_path)
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        run(tmp_path, policy="full", lr=1e30, max_grad_norm=None, warmup_epochs=0, overwrite=True)
    assert contents(tmp_path) == before
    with pytest.raises(KeyboardInterrupt, match="the run that it was to replace is as it was"):
        run(tmp_path, policy="full", progress=StopAfter(0), overwrite=True)
    assert contents(tmp_path) == before


def test_a_run_that_is_overwritten_is_kept_until_the_new_one_is_finished(tmp_path: Path) -> None:
    run(tmp_path, policy="full", epochs=1)
    before = contents(tmp_path)
    for seed in (3, 4):  # of two that are not finished and one that is, the finished one stays
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, policy="full", epochs=2, progress=StopAfter(1), overwrite=True, seed=seed)
        assert contents(tmp_path / "replaced-run") == before
        assert find_checkpoint(tmp_path / "checkpoint") is not None
    run(tmp_path, policy="full", epochs=2, resume=True, seed=4)
    assert not (tmp_path / "replaced-run").exists()
    assert len(lines(tmp_path)) == 2


class Killed(BaseException):
    pass


def changes(patch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the process die before the n-th change to the file system from now on."""
    left = 10**6

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left <= 0:
                raise Killed
            left -= 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, watched)

    for name in ("mkdir", "rename", "replace", "rmdir", "unlink", "write_text"):
        watch(Path, name)
    watch(shutil, "rmtree")
    watch(checkpoint, "write_safetensors")

    def die_after(count: int) -> None:
        nonlocal left
        left = count

    return die_after


def test_at_every_instant_of_overwriting_the_old_run_or_a_new_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    run(model, policy="full", epochs=1)
    before = contents(model)
    new = load_checkpoint(model / "checkpoint")
    die_after = changes(monkeypatch)
    instant, done = 0, False
    while not done:
        folder = RunFolder(tmp_path / f"run{instant}")
        shutil.copytree(model, folder.path)
        die_after(instant)
        try:
            folder.begin(keep=False)
            save_checkpoint(folder.checkpoint, new)
            done = True
        except Killed:
            pass
        die_after(10**6)
        # A second death, while things are put back; then the next start.
        die_after(instant % 7)
        try:
            with folder.alone():
                pass
        except Killed:
            pass
        die_after(10**6)
        (folder.path / ".lock").unlink(missing_ok=True)
        with folder.alone():
            if done or (find_checkpoint(folder.checkpoint) is not None and folder.replaced.exists()):
                assert load_checkpoint(folder.checkpoint).step == new.step
                assert contents(folder.replaced) == before
            else:
                assert contents(folder.path).items() >= before.items()
                assert not folder.replaced.exists()
        assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]
        instant += 1
    assert instant > 12


def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(path: Path, tensors: Any, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        write_safetensors(path, tensors, metadata)
        if calls == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(ResourceError, match=r"/checkpoint: the disk is full \(No space left.*--resume"):
        run(tmp_path, policy="full")
    assert load_checkpoint(tmp_path / "checkpoint").epoch == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors", "checkpoint", "metrics.jsonl", "plan.json", "run.json"
    ]  # fmt: skip
    run(tmp_path, policy="full", resume=True)
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2]


# -- the best epoch --------------------------------------------------------------------------------------


def test_the_weights_of_the_best_epoch_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.2, 0.6, 0.5, 0.6])
    after: list[dict[str, torch.Tensor]] = []
    from trady.training import loop

    def told(model: nn.Module, *_: Any) -> Evaluated:
        after.append({name: value.clone() for name, value in model.state_dict().items()})
        return Evaluated(next(accuracies), 1.0, {})

    monkeypatch.setattr(loop, "evaluate", told)
    run(tmp_path, epochs=4, momentum=0.9)
    best, last = load_file(tmp_path / "best.safetensors"), load_file(tmp_path / "model.safetensors")
    assert best.keys() == last.keys() == after[1].keys()
    assert all(torch.equal(best[name], after[1][name]) for name in best)
    assert all(torch.equal(last[name], after[3][name]) for name in last)
    assert not all(torch.equal(last[name], best[name]) for name in last)
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "trady.epoch": "1"}
    assert json.loads((tmp_path / "result.json").read_text())["best_epoch"] == 1


def test_a_kill_between_the_checkpoint_and_the_best_weights_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_best", killed)
        with pytest.raises(Killed):
            run(tmp_path, epochs=2)
    assert not (tmp_path / "best.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, epochs=2, resume=True, progress=StopAfter(1))
    trained = load_file(tmp_path / "best.safetensors")
    run(tmp_path / "whole", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "first", epochs=2, progress=StopAfter(1))
    expected = load_file(tmp_path / "first" / "best.safetensors")
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_best_weights_are_not_written_again_by_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, policy="full", epochs=1)
    monkeypatch.setattr(saver, "all_weights", lambda model: pytest.fail("written again"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x", policy="full", epochs=2, progress=StopAfter(0))
    monkeypatch.undo()
    stamp = (tmp_path / "best.safetensors").stat().st_mtime_ns
    run(tmp_path, policy="full", epochs=1, resume=True)
    assert (tmp_path / "best.safetensors").stat().st_mtime_ns == stamp


# -- the data --------------------------------------------------------------------------------------------


def images(count: int = 48, **changed: Any) -> ImageDataset:
    plain = small_data(count, 0)
    given = {"pixels": plain.pixels, "labels": plain.labels, "image_size": 12, "normalization": CENTERED,
             "classes": ("cat", "dog", "fox"), **changed}  # fmt: skip
    return ImageDataset(**given)


def one_pixel() -> ImageDataset:
    data = images()
    pixels = data.pixels.copy()
    pixels[7, 3, 3, 1] ^= 1
    return images(pixels=pixels)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: images(24), "training examples was 48, is now 24"),
        (lambda: images(image_size=10), "training image size was 12, is now 10"),
        (lambda: images(classes=("cat", "fox", "dog")), "training classes: number 1 was 'dog', is now 'fox'"),
        (lambda: images(classes=("cat", "dog")), "training classes were 3, are now 2"),
        (lambda: images(normalization=IMAGENET), r"training normalization was 'mean \[127.5\]"),
        (one_pixel, "training pixels was '[0-9a-f]{16}', is now '[0-9a-f]{16}'"),
        (lambda: TensorDataset(*small_data(48, 0).batch(range(48))), "training type was None, is now 'TensorDataset'"),
    ],
)
def test_other_data_is_refused_and_named(tmp_path: Path, other: Callable[[], Any], message: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, policy="full", data=(images(), images(24)), progress=StopAfter(1), epochs=2)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"on other data: .*{message}"):
        run(tmp_path, policy="full", data=(other(), images(24)), resume=True, epochs=2)
    assert contents(tmp_path) == before
    run(tmp_path, policy="full", data=(images(), images(24)), resume=True, epochs=2)


def test_the_order_of_classes_and_a_limit_are_seen_through_the_command(tmp_path: Path) -> None:
    x, y = small_data(48, 0).pixels, small_data(48, 0).labels
    for name, classes in (("a", ["r", "g", "b"]), ("b", ["g", "r", "b"])):
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(classes))

    def command(name: str, *more: object) -> Any:
        settings = ("--policy", "full", "--image-size", 12, "--batch-size", 8, "--epochs", 1)
        return trady_here("finetune", MODEL, tmp_path / f"{name}.npz", *settings, "--out", tmp_path / "run", *more)

    assert command("a").returncode == 0
    assert "training classes: number 0 was 'r', is now 'g'" in command("b", "--resume").stderr
    refused = command("a", "--resume", "--limit", 47)
    assert refused.returncode == 2
    assert "training examples was 48, is now 47" in refused.stderr
    assert command("a", "--resume", "--limit", 48).returncode == 0
    assert load_data(tmp_path / "a.npz", image_size=12).train.classes == ("r", "g", "b")


def test_data_of_ones_own_is_known_by_what_it_says_of_itself() -> None:
    class Own(Dataset[Any]):
        def __init__(self, targets: Any, classes: Any = ("a", "b")) -> None:
            self.targets, self.classes = targets, classes

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("it is not read")

    def of(data: Any) -> dict[str, Any]:
        return identity(data, data)

    plain = of(Own([0, 1, 1]))
    assert plain == of(Own(torch.tensor([0, 1, 1]))) == of(torch.utils.data.DataLoader(Own([0, 1, 1])))
    assert plain != of(Own([1, 1, 0]))
    assert plain != of(Own([0, 1, 1], ("b", "a")))
    assert plain["training classes"] == ["a", "b"]
    untold = of(Own(["x.png", 2, 3], None))
    assert untold == {f"{part} {key}": untold[f"{part} {key}"] for part in PARTS for key in ("type", "examples")}
    tensors = TensorDataset(torch.arange(6.0), torch.arange(6))
    assert of(tensors) != of(TensorDataset(torch.arange(6.0) + 1, torch.arange(6)))
    assert of(Subset(tensors, [0, 1])) != of(Subset(tensors, [1, 0]))
    assert of(ConcatDataset([tensors, Own([1])])) != of(ConcatDataset([tensors, Own([0])]))
    nested = of(Subset(ConcatDataset([tensors]), [0]))
    assert json.loads(json.dumps(nested)) == nested


def test_of_very_large_data_evenly_spaced_examples_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "CONTENT_BYTES", 12 * 12 * 3 * 12)
    whole = identity(images(), images())
    pixels = images().pixels.copy()
    for at, seen in ((1, False), (4, True)):
        changed = pixels.copy()
        changed[at] ^= 1
        assert (identity(images(pixels=changed), images()) != whole) is seen


def test_a_run_that_was_recorded_without_its_data_is_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, policy="full", epochs=1)
    saved = load_checkpoint(tmp_path / "checkpoint")
    save_checkpoint(tmp_path / "checkpoint", replace(saved, data=None, structure=""))
    assert len(run(tmp_path, policy="full", epochs=1, resume=True).history) == 1


def test_a_model_with_other_layers_and_one_with_other_weights_are_told_apart(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="another model: its layers are others"):
        run(tmp_path, epochs=1, resume=True, model=small_net(classes=4))
    model = small_net()
    with torch.no_grad():
        model.features[0].weight.mul_(2)
    with pytest.raises(CheckpointError, match="another model: its layers are the same, its weights are others"):
        run(tmp_path, epochs=1, resume=True, model=model)


# -- the description of a checkpoint -----------------------------------------------------------------------


def test_every_changed_value_in_the_description_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    run(tmp_path, policy="full", epochs=1)
    whole = (folder / DESCRIPTION).read_bytes()
    expected = json.loads(whole)
    noticed = 0
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1
        (folder / DESCRIPTION).write_bytes(changed)
        try:
            same = json.loads(changed) == expected
        except ValueError:
            same = False
        if same:
            continue
        with pytest.raises(CheckpointError, match=rf"{DESCRIPTION}|{TENSORS}"):
            load_checkpoint(folder)
        noticed += 1
    assert noticed > 100


def test_metrics_that_are_no_text_end_where_they_do(tmp_path: Path) -> None:
    class Stop(Silent):
        def end_epoch(self, metrics: EpochMetrics) -> None:
            if metrics.epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, policy="full", epochs=2, progress=Stop())
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 1, \xff\xfe')
    run(tmp_path, policy="full", epochs=2, resume=True)
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1]
