"""Where the parts of ``benchmarks.gpu`` run, and what they run there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import text
from benchmarks.options import models_folder
from benchmarks.small import SMALL
from benchmarks.tasks import CrossEntropy, Task, needs, seeded
from benchmarks.workloads import WORKLOADS, Workload, laid_out

Figures = dict[str, Any]


@dataclass(frozen=True)
class Where:
    """One attempt's surroundings.

    Attributes:
        device: ``cuda``, or ``cpu`` to try the code.
        small: Whether networks are the small ones of the tests.
        deadline: Of the whole part, in seconds of ``time.time()``. What is not begun by then is not begun.
        models: Folder of the paper's backbones; without them their rows are left out.
    """

    device: torch.device
    small: bool
    deadline: float
    models: Path

    @classmethod
    def of(cls, device: str, deadline: float, *, small: bool) -> Where:
        """Return surroundings with the usual folder of backbones."""
        return cls(torch.device(device), small, deadline, models_folder(None))

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.time()

    def workload(self, name: str, dtype: torch.dtype | None = None) -> Workload:
        """Return a workload of this device, in this dtype; MiniLM has random weights, so that no file is needed."""
        known = {"minilm": _minilm_small if self.small else _minilm}
        make = known.get(name) or (SMALL.get(name) if self.small else None) or WORKLOADS[name].make
        return laid_out(replace(WORKLOADS[name], make=make), device=self.device, dtype=dtype)


def random_minilm(batch: int, length: int, layers: int, width: int) -> Task:
    """BERT in MiniLM's shape, with random weights."""
    hf = needs("transformers", "transformers")
    config = hf.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        num_labels=text.CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    labels = torch.randint(text.CLASSES, (batch,), generator=torch.Generator().manual_seed(1))
    model = seeded(lambda: hf.BertForSequenceClassification(config))
    return Task(model, {"input_ids": text.tokens(batch, length, config.vocab_size)}, CrossEntropy(labels))


def _minilm(models: Path) -> Task:
    return random_minilm(32, 128, layers=6, width=384)


def _minilm_small(models: Path) -> Task:
    return random_minilm(2, 8, layers=1, width=48)


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Give back memory that nothing uses, and begin to count the allocator's peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocator_peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Run something; return the most bytes that PyTorch's allocator had given out, ``None`` without a GPU."""
    if device.type != "cuda":
        run()
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    wait(device)
    return torch.cuda.max_memory_allocated(device)


def timed(steps: Mapping[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, Figures]:
    """Time steps in turns.

    Args:
        steps: What to time.
        rounds: Rounds that count; two more warm up.
        device: Where they run.

    Returns:
        For each, medians in seconds: ``step`` until the device has done it, ``host`` until the call returns.

    """
    whole: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, rounds):
        for name, step in steps.items():
            wait(device)
            began = time.perf_counter()
            step()
            returned = time.perf_counter()
            wait(device)
            if turn >= 0:
                host[name].append(returned - began)
                whole[name].append(time.perf_counter() - began)
    return {name: {"step": median(whole[name]), "host": median(host[name])} for name in steps}


def in_dtype(dtype: str | None) -> torch.dtype | None:
    """Return the dtype of a name."""
    return None if dtype is None else getattr(torch, dtype)


adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)
