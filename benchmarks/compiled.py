"""What torch.compile gives on this machine: to full fine-tuning, and to TraDy's layers if a compiler had the rest.

The latter is not what trady does. Each layer whose channels train is one operation that the compiler takes as it is:
it keeps the selected channels and computes their gradient. All else is the compiler's, also what is kept for the
backward pass; channels drawn again are compiled again. Held against TraDy's own step with nothing recomputed.
docs/composition.md draws the conclusion. Timings gate nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.methods import METHODS, RATE, TITLES
from benchmarks.options import (
    add_json,
    add_models,
    add_workloads,
    console_for,
    machine,
    main,
    models_folder,
    write_json,
)
from benchmarks.prediction import reduced
from benchmarks.skipped import SkippedError
from benchmarks.speed import add_timing, in_turns, ratio, timing
from benchmarks.tasks import Task
from benchmarks.workloads import WORKLOADS, Workload

Run = Callable[[], None]

#: By number of the layer: the channels that train, and what their gradient was.
_CHANNELS: dict[int, Tensor] = {}
GRADIENTS: dict[int, Tensor] = {}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int) -> Tensor:
    return F.linear(x, weight, bias)


def _keep(x: Tensor, layer: int) -> Tensor:
    return x.index_select(-1, _CHANNELS[layer])


def _backward(gradient: Tensor, kept: Tensor, weight: Tensor, layer: int) -> Tensor:
    GRADIENTS[layer] = kept.flatten(0, -2).T @ gradient.flatten(0, -2)
    return gradient @ weight


def _operation(name: str, function: Callable[..., Tensor], arguments: str, outputs: Callable[..., int]) -> Any:
    """Register an operation whose result has the shape of its first argument but for the last dimension."""
    made = torch.library.custom_op(
        f"trady_benchmarks::{name}", function, mutates_args=(), schema=f"({arguments}) -> Tensor"
    )
    made.register_fake(lambda x, *rest: x.new_empty((*x.shape[:-1], outputs(*rest))))
    return made


LINEAR = _operation("linear", _linear, "Tensor x, Tensor weight, Tensor? bias, int layer", lambda w, b, i: w.shape[0])
KEEP = _operation("keep", _keep, "Tensor x, int layer", lambda i: len(_CHANNELS[i]))
BACKWARD = _operation(
    "backward", _backward, "Tensor gradient, Tensor kept, Tensor weight, int layer", lambda kept, w, i: w.shape[1]
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.layer = inputs
    ctx.save_for_backward(KEEP(x, ctx.layer), weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight = ctx.saved_tensors
    return BACKWARD(gradient.contiguous(), kept, weight, ctx.layer), None, None, None


LINEAR.register_autograd(_differentiate, setup_context=_save)


def compiled_layers(workload: Workload, task: Task, backend: str = "inductor") -> Run:
    """TraDy's layers as single operations in a compiled model: forward and backward, and the head's update.

    Raises:
        SkippedError: The workload trains other layers than ``nn.Linear``.

    """
    tuner = workload.arm(task)
    selection, head = tuner.selection, tuner.plan.head
    tuner.finish()
    model = task.model.requires_grad_(False).train()
    layers = {name: model.get_submodule(name) for name in selection}
    if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        raise SkippedError("it is written for models of linear layers")
    _CHANNELS.clear()
    GRADIENTS.clear()
    for number, (name, layer) in enumerate(layers.items()):
        _CHANNELS[number] = torch.tensor(selection[name])
        layer.forward = lambda x, layer=layer, number=number: LINEAR(x, layer.weight, layer.bias, number)
    start = nn.Parameter(torch.zeros(()))  # gradients are to reach the first layer
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_hook(lambda module, given, output: output + start)
    trained = [p.requires_grad_() for name in head for p in model.get_submodule(name).parameters()]
    return _step(_compiled(task, backend), [*trained, start])


def compiled_full(task: Task, backend: str = "inductor") -> Run:
    """Full fine-tuning of the compiled model."""
    task.model.requires_grad_(True).train()
    return _step(_compiled(task, backend), list(task.model.parameters()))


def _compiled(task: Task, backend: str) -> Task:
    model: Any = torch.compile(task.model, backend=backend)
    return replace(task, model=model)


def _step(task: Task, trained: Sequence[Tensor]) -> Run:
    optimizer = torch.optim.SGD(trained, lr=RATE)

    def run() -> None:
        task.run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure(
    workload: Workload, models: Path, rounds: int, clock: Callable[[], float], *, small: bool = False
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time the steps in turns.

    Returns:
        Seconds of every method, one a round; and seconds on the clock of the first step of what is compiled.

    """

    def fresh() -> Task:
        task = workload.make(models)
        return reduced(task) if small else task

    first = dict[str, float]()
    with ExitStack() as stack:
        plain = ("full", "trady") if workload.kind == "cnn" else ("full", "trady", "trady-keep")
        steps = {name: stack.enter_context(METHODS[name](workload, fresh())).run for name in plain}
        steps["full, compiled"] = compiled_full(fresh())
        with suppress(SkippedError):
            steps["layers, compiled"] = compiled_layers(workload, fresh())
        for name in list(steps)[len(plain) :]:
            started = time.perf_counter()
            steps[name]()
            first[name] = time.perf_counter() - started
        return in_turns(steps, max(1, rounds), clock), first


def run(arguments: Sequence[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    add_workloads(parser, WORKLOADS)
    add_timing(parser, repeats=5)
    parser.add_argument("--small", action="store_true", help="a quarter of each batch, which takes less time")
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    rounds, clock = timing(options)
    console, figures = console_for(options.json), dict[str, Any]()
    for name in options.workload:
        workload, models = WORKLOADS[name], models_folder(options.models)
        seconds, first = measure(workload, models, rounds, clock, small=options.small)
        console.print(_table(workload, seconds, first))
        figures[name] = {"seconds": seconds, "first_step_seconds": first}
    here = machine()
    console.print(f"{options.clock} time, {here['threads']} threads, torch {here['torch']}")
    write_json(options.json, {"clock": options.clock, "small": options.small, "workloads": figures})
    return 0


def _table(workload: Workload, seconds: dict[str, list[float]], first: dict[str, float]) -> Table:
    table = Table(title=f"{workload.name}: {workload.describe}", title_justify="left")
    table.add_column("method")
    for column in ("step, median", "÷ full", "÷ TraDy", "first step"):
        table.add_column(column, justify="right", no_wrap=True)
    ours = "trady-keep" if "trady-keep" in seconds else "trady"
    for method, times in seconds.items():
        ratios = (f"{ratio(seconds, method, over):.2f} ×" for over in ("full", ours))
        compiling = f"{first[method]:.0f} s" if method in first else ""
        table.add_row(TITLES.get(method, method), f"{median(times) * 1e3:.0f} ms", *ratios, compiling)
    return table


if __name__ == "__main__":
    main(run)
