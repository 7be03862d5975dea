from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small_task import TiedNet, small_data, small_net
from trady.errors import CheckpointError
from trady.records.files import write_json, write_tensors
from trady.training import checkpoint as module
from trady.training.checkpoint import (
    DESCRIPTION,
    TENSORS,
    Checkpoint,
    check_settings,
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    signed,
)
from trady.training.run import finetune
from trady.training.state import State, load_optimizer_state, optimizer_to_state


def example(epoch: int = 0) -> Checkpoint:
    tensors = {"a.weight": torch.full((3, 2), float(epoch)), "0/step": torch.tensor(7)}
    return Checkpoint(epoch, 10 * epoch, {"lr": 0.1, "seed": 0}, "f00d", {"trainer": State(tensors, {"epoch": epoch})})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", example(4))
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert (loaded.epoch, loaded.step, loaded.settings, loaded.model) == (
        4,
        40,
        {"lr": 0.1, "seed": 0},
        "f00d",
    )
    assert loaded.states["trainer"].meta == {"epoch": 4}
    for name, tensor in example(4).states["trainer"].tensors.items():
        assert torch.equal(loaded.states["trainer"].tensors[name], tensor)


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", example())
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [DESCRIPTION, TENSORS]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("interrupted", [False, True])
def test_one_whole_checkpoint_exists_at_every_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Stop before every single change to the file system that writing a checkpoint makes."""
    left = 10**6

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(Path, "mkdir")
    watch(Path, "rename")
    watch(Path, "write_text")
    watch(shutil, "rmtree")
    watch(module, "write_safetensors")
    instant, done = 0, False
    while not done:
        folder = tmp_path / str(instant) / "checkpoint"
        save_checkpoint(folder, example(1))
        if interrupted:  # as a kill between the two renames leaves it
            folder.rename(folder.with_name("checkpoint.previous"))
        left = instant
        try:
            save_checkpoint(folder, example(2))
            done = True
        except Killed:
            pass
        left = 10**6
        assert load_checkpoint(folder).epoch == 2 if done else load_checkpoint(folder).epoch in (1, 2)
        save_checkpoint(folder, example(3))
        assert load_checkpoint(folder).epoch == 3
        instant += 1
    assert instant >= 6


@given(st.data())
@settings(max_examples=40)
def test_a_truncated_or_changed_file_is_never_loaded(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("c") / "checkpoint"
    save_checkpoint(folder, example())
    path = folder / data.draw(st.sampled_from([TENSORS, DESCRIPTION]))
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(folder)


def test_every_flipped_bit_in_the_tensors_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, example())
    whole = bytearray((folder / TENSORS).read_bytes())
    for position in range(0, len(whole), 17):
        changed = bytearray(whole)
        changed[position] ^= 4
        (folder / TENSORS).write_bytes(changed)
        with pytest.raises(CheckpointError, match="truncated or changed"):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "this is no checkpoint .*choose another folder"),
        ({"version": 3}, "version 3, this trady reads version 2 and 1: .*--overwrite"),
        ({"tensors": None}, "checksum"),
        ({"states": 3}, "damaged"),
        ({"epoch": None}, "damaged"),
    ],
)
def test_a_foreign_checkpoint_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, example())
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**description, **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": None}, "damaged: tensors is null"),
        ({"states": 3}, "damaged: states is 3, not an object"),
        ({"epoch": -2}, "damaged: epoch is -2; the smallest possible is -1"),
        ({"data": ["a"]}, "damaged: data is a list"),
        ({"structure": None}, "damaged: structure is null, not a text"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_checksum_does_not_stand_in_for_a_check(
    tmp_path: Path, change: dict[str, Any], message: str, version: int
) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, example())
    description = {**json.loads((folder / DESCRIPTION).read_text()), **change, "version": version}
    (folder / DESCRIPTION).write_text(json.dumps(signed(description)))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(folder)
    save_checkpoint(folder, example())
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS} cannot be read"):
        load_checkpoint(folder)


def test_changed_settings_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"lr was 0.1, is now 0.2; seed was 0, is now None"):
        check_settings(example(), {"lr": 0.2}, Path("runs/a/checkpoint"))


def resume(out: Path, model: nn.Module, **options: Any) -> None:
    finetune(model, small_data(16, 0), small_data(8, 1), out=out, batch_size=8, progress=False,
             **{"epochs": 1, "policy": "full", "resume": True, **options})  # fmt: skip


def test_a_run_resumes_with_its_own_model_and_settings_only(tmp_path: Path) -> None:
    resume(tmp_path, small_net(), resume=False)
    resume(tmp_path, small_net())
    with pytest.raises(CheckpointError, match="is of another model"):
        resume(tmp_path, small_net(classes=5))
    with pytest.raises(CheckpointError, match=r"lr was 0\.05, is now 0\.2"):
        resume(tmp_path, small_net(), lr=0.2)
    resume(tmp_path, small_net(), epochs=2)  # more are added to a finished run
    with pytest.raises(CheckpointError, match="epochs was 2, is now 1"):
        resume(tmp_path, small_net())


def test_metrics_that_do_not_reach_the_checkpoint_are_refused(tmp_path: Path) -> None:
    resume(tmp_path, small_net(), resume=False, epochs=2)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    with pytest.raises(CheckpointError, match="does not have the epochs 0 to 1"):
        resume(tmp_path, small_net(), epochs=2)


def test_lines_after_the_checkpoint_are_removed_from_the_metrics(tmp_path: Path) -> None:
    resume(tmp_path, small_net(), resume=False)
    metrics = tmp_path / "metrics.jsonl"
    line = json.loads(metrics.read_text())
    with metrics.open("a") as file:
        file.write(json.dumps({**line, "epoch": 1}) + "\n" + '{"epoch": 2, "st')
    resume(tmp_path, small_net())
    assert [json.loads(text)["epoch"] for text in metrics.read_text().splitlines()] == [0]


def test_the_fingerprint_sees_names_shapes_and_values_but_not_the_head() -> None:
    model = small_net()
    head = frozenset({"classifier.weight", "classifier.bias"})
    before = fingerprint(model, head)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert fingerprint(model, head) == before
    with torch.no_grad():
        model.features[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(model, head) != before
    assert fingerprint(small_net(4), head) != before


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    ],
)
def test_an_optimizers_state_survives_tensors_and_json(make: Any) -> None:
    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    first = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    optimizer = make(first)
    step(first, optimizer, 0)
    live = optimizer_to_state(optimizer)
    state = State({name: tensor.clone() for name, tensor in live.tensors.items()}, live.meta)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    restored = make(second)
    load_optimizer_state(restored, State(state.tensors, json.loads(json.dumps(state.meta))))
    step(first, optimizer, 1)
    step(second, restored, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(CheckpointError, match="does not fit this optimizer"):
        load_optimizer_state(make(second[:1]), state)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 0.1 + 0.2})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 0.1 + 0.2}
    assert [place.name for place in tmp_path.iterdir()] == ["plan.json"]


def test_tensors_that_share_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = torch.arange(6.0)
    write_tensors(tmp_path / "t.safetensors", {"a": whole[:3], "b": whole[3:], "c": whole.view(2, 3).T}, {})
    loaded = load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded["c"], whole.view(2, 3).T)
    assert torch.equal(loaded["b"], whole[3:])


def test_tied_weights_lie_in_the_file_once_and_are_named(tmp_path: Path) -> None:
    from safetensors import safe_open

    resume(tmp_path, TiedNet(), resume=False)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "again.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata()["again.weight"] == "net.classifier.weight"


def test_find_checkpoint_prefers_the_newer_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert find_checkpoint(folder) is None
    save_checkpoint(folder, example(1))
    folder.rename(tmp_path / "checkpoint.previous")
    assert load_checkpoint(folder).epoch == 1
    save_checkpoint(folder, example(2))
    assert load_checkpoint(folder).epoch == 2
    assert not (tmp_path / "checkpoint.previous").exists()
