"""The parts, in order of importance: what each tries, and what share of the time it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import correctness, language_models, memory, times
from benchmarks.gpu.where import Figures, Where
from benchmarks.workloads import WORKLOADS

Attempt = Callable[[str, Where, Callable[[Figures], None]], None]


@dataclass(frozen=True)
class Part:
    """One kind of measurement.

    Attributes:
        describe: For people.
        items: What is tried, one process each.
        attempt: Measures one item; calls back with what it has so far, so that nothing is lost when time is up.
        share: Of the whole time. What a part leaves goes to those behind it.
        together: How many processes may run side by side: 1 where the clock is read.
    """

    describe: str
    items: tuple[str, ...]
    attempt: Attempt
    share: float
    together: int


PARTS: dict[str, Part] = {
    "gradients": Part(
        "gradients of the drawn channels against the plain model's: float32 without TF32, bf16, autocast",
        tuple(WORKLOADS),
        correctness.gradients,
        0.15,
        8,
    ),
    "peaks": Part(
        "the peak of a step as planned, by the ledger and by PyTorch's allocator, under ten budgets",
        tuple(WORKLOADS),
        memory.peaks,
        0.22,
        8,
    ),
    "replays": Part(
        "a training with passes that are replayed from a CUDA graph against one with passes that run",
        tuple(name for name in WORKLOADS if name != "effnet"),
        correctness.replays,
        0.1,
        8,
    ),
    "times": Part(
        "time and host time of a step in bf16, host synchronisations, and with the step captured as a graph",
        tuple(name for name in WORKLOADS if name != "effnet"),
        times.steps,
        0.23,
        1,
    ),
    "language": Part(
        "Llama 3.2 shapes in bf16 with AdamW: peak and tokens a second",
        tuple(f"{size}-{shape}" for size in ("1b", "3b") for shape in language_models.BATCHES),
        language_models.steps,
        0.22,
        1,
    ),
    "limits": Part(
        "largest batch and longest sequence of the 1-billion-parameter shape in 16 and 24 GiB",
        tuple(f"{limit}-{method}" for limit in ("16GiB", "24GiB") for method in language_models.LIMITED),
        language_models.limits,
        0.13,
        3,
    ),
    "training": Part(
        "a training that must end where the CPU's does",
        ("device-0", "cpu-0", "device-1", "cpu-1"),
        correctness.training,
        0.1,
        4,
    ),
}
