"""Host time, the time between the kernels: by model, mode and recomputation, and by batch size.

`narrow`: a step of models so narrow that kernels take next to nothing, which is what a GPU has to wait for.
`batches`: a step of the workloads by batch size. All methods run in turns in one process; ratios are taken round by
round, and their median is shown. Processor time of one thread by default: the clock on the wall says more about who
else uses the machine. Timings gate nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.host.profile import PARTS, where_it_goes
from benchmarks.host.tasks import NARROW, last_blocks, with_samples
from benchmarks.methods import METHODS, TITLES, Method, TunedStep, trady_step
from benchmarks.options import add_json, add_models, console_for, machine, main, models_folder, write_json
from benchmarks.skipped import SkippedError
from benchmarks.speed import add_timing, in_turns, ratio, timing
from benchmarks.tasks import MissingPackageError
from benchmarks.workloads import WORKLOADS, Workload
from trady.errors import TradyError

#: Batch sizes by kind of network.
BATCHES = {"cnn": (1, 2, 4, 8, 32), "transformer": (1, 4)}

#: Host time that TraDy may take, over that of another method.
HOST_AIMS = {"trady-keep": ("full", 1.3), "trady-recomputed": ("checkpoint", 1.2)}

#: By workload and batch size, the step of TraDy over that of full fine-tuning that is aimed at.
BATCH_AIMS = {("mbv2-w0.35", 1): 0.6, ("mbv2-w0.35", 4): 0.4, ("mbv2-w0.35", 32): 0.35}


def _recomputing(mode: str) -> Method:
    def step(workload: Workload, task: Any, seed: int = 0) -> Any:
        return METHODS["trady"](workload, task, seed, recompute=mode)

    return step


@contextmanager
def _settled(workload: Workload, task: Any, seed: int = 0) -> Iterator[TunedStep]:
    """A step behind epoch 0, in which a ranking is learnt and channels are drawn every other step."""
    with trady_step(workload, task, seed) as step:
        step.tuner.resample(1)
        yield step


_METHODS: dict[str, Method] = {
    "full": METHODS["full"],
    "checkpoint": METHODS["checkpoint"],
    "head": METHODS["head"],
    "last-blocks": last_blocks,
    "trady": _settled,
    "trady-learning": trady_step,
    "trady-keep": _recomputing("none"),
    "trady-recomputed": _recomputing("all"),
}

_TITLES = {
    **TITLES,
    "last-blocks": "last blocks",
    "trady-recomputed": "TraDy, all recomputed",
    "trady-learning": "TraDy, epoch 0",
}

NARROW_METHODS = ("full", "checkpoint", "head", "last-blocks", "trady-keep", "trady-recomputed")

BATCH_METHODS = ("full", "head", "last-blocks", "trady", "trady-learning")


def measure(
    workload: Workload, models: Path, rounds: int, clock: Callable[[], float], methods: Sequence[str], profiled: int
) -> dict[str, Any]:
    """Time a step of every method, in turns, and profile those of TraDy.

    Args:
        workload: The workload; each method gets a model of its own.
        models: Folder of the backbones.
        rounds: How often to time each.
        clock: Gives seconds.
        methods: Keys of the table above.
        profiled: Steps to profile; 0 is none.

    Returns:
        ``seconds``, one a round, by method; ``over``, medians of ratios; ``parts``, milliseconds of a profiled step;
        ``skipped``, methods with the reason.

    """
    with ExitStack() as stack:
        steps, skipped = dict[str, Callable[[], None]](), dict[str, str]()
        for name in methods:
            try:
                steps[name] = stack.enter_context(_METHODS[name](workload, workload.make(models))).run
            except (SkippedError, MissingPackageError) as reason:
                skipped[name] = str(reason)
            except TradyError as reason:
                if name != "trady-recomputed":  # nothing may be worth recomputing
                    raise
                skipped[name] = str(reason)
        seconds = in_turns(steps, rounds, clock)
        parts = {
            name: where_it_goes(step, profiled) for name, step in steps.items() if profiled and name.startswith("trady")
        }
    over = {
        other: {name: ratio(seconds, name, other) for name in seconds}
        for other in ("full", "checkpoint")
        if other in seconds
    }
    return {"seconds": seconds, "over": over, "parts": parts, "skipped": skipped}


def as_table(title: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table that a person reads, one line a method and row of figures."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("method")
    for column in ("step, median", "÷ full", "÷ checkpointing"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        for place, (method, times) in enumerate(row["seconds"].items()):
            over = (
                f"{row['over'][other][method]:.2f} ×" if other in row["over"] else ""
                for other in ("full", "checkpoint")
            )
            last = place == len(row["seconds"]) - 1
            table.add_row(
                "" if place else name, _TITLES[method], f"{median(times) * 1e3:.1f} ms", *over, end_section=last
            )
    return table


def parts_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of where the time goes."""
    table = Table(title="Where it goes, milliseconds of a step under Python's profiler", title_justify="left")
    table.add_column("")
    table.add_column("method")
    for part in PARTS:
        table.add_column(part, justify="right")
    for name, row in found.items():
        for method, parts in row["parts"].items():
            table.add_row(name, _TITLES[method], *(f"{parts[part]:.1f}" for part in PARTS))
    return table


def aims(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold what was measured against the aims."""
    reached = []
    for name, row in found.items():
        held = HOST_AIMS if name in NARROW else {}
        workload, _, samples = name.partition(" × ")
        if samples and (aim := BATCH_AIMS.get((workload, int(samples)))) is not None:
            held = {"trady": ("full", aim)}
        for method, (over, aim) in held.items():
            if over in row["over"] and method in row["over"][over]:
                measured = row["over"][over][method]
                line = {"row": name, "method": method, "over": over, "aim": aim, "measured": measured}
                reached.append({**line, "met": measured <= aim})
    return reached


def show(console: Console, title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the tables of one part."""
    console.print(as_table(title, found))
    if any(row["parts"] for row in found.values()):
        console.print(parts_table(found))
    for name, row in found.items():
        for method, reason in row["skipped"].items():
            console.print(f"{name}: {_TITLES[method]} is left out: {reason}", style="dim", highlight=False)
    for aim in aims(found):
        word = "[green]met[/]" if aim["met"] else "[yellow]missed[/]"
        what = f"{aim['row']}, {_TITLES[aim['method']]}, aim {aim['aim']:g} × {_TITLES[aim['over']]}"
        console.print(f"{word}  {what}: {aim['measured']:.2f} ×")


def run(arguments: Sequence[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument(
        "--narrow",
        nargs="*",
        choices=list(NARROW),
        default=list(NARROW),
        metavar="NAME",
        help=f"narrow models (default: {' '.join(NARROW)}; nothing behind it: none)",
    )
    parser.add_argument(
        "--workload",
        nargs="*",
        choices=list(WORKLOADS),
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"workloads by batch size (default: {' '.join(WORKLOADS)}; nothing behind it: none)",
    )
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="batch sizes (default: 1 2 4 8 32; 1 4)")
    parser.add_argument("--profile", type=int, default=5, metavar="N", help="steps to profile, 0 is none (default: 5)")
    add_timing(parser, repeats=15)
    add_models(parser)
    add_json(parser)
    parser.set_defaults(clock="cpu", threads=1)
    options = parser.parse_args(arguments)
    rounds, clock = timing(options)
    console, models = console_for(options.json), models_folder(options.models)
    narrow = {
        name: measure(NARROW[name], models, rounds, clock, NARROW_METHODS, options.profile) for name in options.narrow
    }
    if narrow:
        show(console, "Host time of a step: models so narrow that kernels take next to nothing", narrow)
    batches = {
        f"{name} × {samples}": measure(
            with_samples(WORKLOADS[name], samples), models, rounds, clock, BATCH_METHODS, options.profile
        )
        for name in options.workload
        for samples in options.batch or BATCHES[WORKLOADS[name].kind]
    }
    if batches:
        show(console, "A step by workload and batch size", batches)
    here = machine()
    load = " ".join(f"{x:.1f}" for x in here["load_average"] or ()) or "unknown"
    console.print(
        f"{options.clock} time, {rounds} rounds, {torch.get_num_threads()} threads on {here['processors']} processors, "
        f"torch {here['torch']}, load average {load} after the last round"
    )
    figures = {"clock": options.clock, "narrow": narrow, "batches": batches, "aims": [*aims(narrow), *aims(batches)]}
    write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    main(run)
