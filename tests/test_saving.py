"""Saving and finishing take no second copy of a model: tensors go to their files one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import trady
from tests.alive import objects
from tests.loops import wide
from tests.small_task import small_data
from trady.errors import FileError
from trady.memory.live import LiveBytes
from trady.records.files import write_tensors
from trady.records.tensors import LazyTensors, Outline, joined, write_safetensors
from trady.training.run import finetune

TYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
    torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64, torch.float8_e5m2,
    torch.float8_e4m3fn,
]  # fmt: skip


def test_a_file_is_byte_for_byte_that_of_the_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{place}.{dtype}": torch.randn(3, 5).to(dtype) for place, dtype in enumerate(TYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "läuft": torch.arange(3), "a": torch.ones(7)}
    metadata = {"what": 'with "quotes", ü and\nlines'}  # of several, the library shuffles the order
    save_file(tensors, tmp_path / "theirs", metadata)
    write_safetensors(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_that_share_memory_or_lie_otherwise_are_written_as_they_are(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "part": whole[:, 1], "turned": whole.t(), "tied": whole}
    tensors["image"] = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    write_tensors(tmp_path / "file", tensors, {})
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"'strange' is torch\.complex128"):
        write_tensors(tmp_path / "file", {"strange": torch.zeros(2, dtype=torch.complex128)}, {})
    lying = LazyTensors({"grown": Outline((2,), torch.float32, lambda: torch.zeros(3))})
    with pytest.raises(ValueError, match=r"shape \(2,\) came as \(3,\)"):
        write_tensors(tmp_path / "file", lying, {})
    assert not list(tmp_path.iterdir())


def test_lazy_tensors_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    made: list[str] = []

    def making(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            made.append(name)
            return torch.full((2,), float(ord(name)))

        return make

    lazy = LazyTensors({name: Outline((2,), torch.float32, making(name)) for name in "ab"})
    both = joined(("x/", lazy), ("y/", {"c": torch.ones(1)}))
    assert list(both) == ["x/a", "x/b", "y/c"]
    assert len(both) == 3
    assert not made
    assert both["x/b"].tolist() == [98.0, 98.0]
    write_safetensors(tmp_path / "file", both, {})
    assert made == ["b", "a", "b"]
    assert load_file(tmp_path / "file")["x/a"].tolist() == [97.0, 97.0]


#: The largest weight of the model.
LARGEST = 3 * 144 * 256 * 4


def added(do: Callable[[], Any], alive: list[Tensor]) -> int:
    """Bytes that something takes beside tensors that are there."""
    with LiveBytes() as live:
        live.register(alive)
        before = live.current
        do()
    return live.peak - before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_state_a_delta_and_the_end_take_no_more_than_a_layer(layout: torch.memory_format, tmp_path: Path) -> None:
    x, labels = torch.randn(4, 3, 12, 12), torch.arange(4) % 3
    model = wide().to(memory_format=layout)  # type: ignore[call-overload]
    tuner = trady.prepare(model, x, budget="64 MiB", policy="dynamic-random")
    optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.01))
    for epoch in range(2):
        tuner.resample(epoch)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = sum(p.numel() * 4 for p in model.state_dict().values())
    alive = [*model.state_dict().values(), *tuner._armed.indices, *(p for p in tuner.parameters())]
    assert added(tuner.state_dict, alive) > 0.9 * whole  # every channel trains, and the state has a copy of each

    def save() -> None:
        write_tensors(tmp_path / "state", tuner.state_dict(lazily=True)["tensors"], {})

    assert added(save, alive) < 1.2 * LARGEST
    eager = tuner.state_dict()["tensors"]
    read = load_file(tmp_path / "state")
    assert read.keys() == eager.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in eager.items())
    del eager, read
    assert added(tuner.finish, alive) < 1.2 * LARGEST


@pytest.mark.parametrize("policy", ["dynamic-random", "full"])
def test_a_run_saves_and_ends_inside_the_peak_of_its_steps(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    model = wide()

    def watched(path: Path, *what: Any) -> None:
        saved.append(added(lambda: write_safetensors(path, *what), objects()))

    for module in ("trady.records.files", "trady.training.checkpoint"):
        monkeypatch.setattr(f"{module}.write_safetensors", watched)
    result = finetune(
        model, small_data(16, 0), small_data(8, 1), budget="64 MiB", policy=policy, epochs=2, batch_size=8, lr=0.01,
        out=tmp_path / "run", optimizer="adamw", progress=False,
    )  # fmt: skip
    assert len(saved) >= 4  # checkpoints, the best weights, the model
    assert max(saved) < 1.2 * LARGEST
    assert result.peak_bytes > max(saved)
