"""How long does a step take on the GPU, and how long does the GPU wait for the host?"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from benchmarks.gpu.where import Figures, Where, forget, timed, wait
from benchmarks.methods import METHODS, Step, TunedStep
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError
from trady.tuner.capture import WARM_UP

#: What is timed side by side.
TIMED = ("full", "checkpoint", "head", "lora", "lora-checkpoint", "trady", "trady-keep")

ROUNDS = 15


def steps(item: str, where: Where, write: Callable[[Figures], None]) -> None:
    """Time the methods in turns, in bf16; then count host synchronisations, then replay captured passes.

    Full fine-tuning is captured as a whole, in plain PyTorch; of TraDy's steps the forward and backward pass is
    (``Tuner.capture``), the optimizer runs behind.
    """
    workload, found = where.workload(item, torch.bfloat16), Figures()
    with ExitStack() as stack:
        made: dict[str, Step] = {}
        for name in TIMED:
            try:
                made[name] = stack.enter_context(METHODS[name](workload, workload.make(where.models)))
            except (SkippedError, MissingPackageError) as reason:
                found[name] = {"left_out": str(reason)}
        found |= timed({name: step.run for name, step in made.items()}, 3 if where.small else ROUNDS, where.device)
        write(found)
        for name, step in made.items():
            if where.on_cuda:
                found[name]["synchronisations"] = synchronisations(step.run)
            if isinstance(step, TunedStep) and where.seconds_left > 0:
                found[name]["captured"] = replayed(step, where.device)
                write(found)
        if where.on_cuda and where.seconds_left > 0:
            found["full"]["captured"] = captured(made["full"].run, where.device)
            write(found)
    forget(where.device)


def replayed(step: TunedStep, device: torch.device) -> Figures:
    """Time a step whose passes are replayed, or say why they are not."""
    run = step.captured()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(WARM_UP + 1):
            run()
    if caught:
        return {"error": str(caught[-1].message)[:400]}
    return timed({"replay": run}, ROUNDS, device)["replay"]


def synchronisations(run: Callable[[], None]) -> dict[str, int]:
    """Run a step on CUDA; return how often each line of Python made the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    )
    return dict(places.most_common(20))


def captured(run: Callable[[], None], device: torch.device) -> Figures:
    """Capture a step as a CUDA graph and time its replay; where that fails, say where."""
    try:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return timed({"replay": graph.replay}, ROUNDS, device)["replay"]
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in frames]
        with suppress(RuntimeError):  # a failed capture can leave the device unusable; this process ends here
            wait(device)
        return {"error": f"{type(error).__name__}: {error}"[:400], "frames": where}
