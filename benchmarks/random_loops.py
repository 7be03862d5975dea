"""Is a budget kept whatever a loop does? Random models, batches, budgets, policies, optimizers and loops.

Every combination is a few training steps. Its memory is counted by a ledger that starts from every tensor alive that
the combination has made, whether or not an operation touches it. A combination that is refused beforehand, or before a
forward pass that would break the budget, keeps it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import trady
from benchmarks.options import add_json, console_for, main, write_json
from trady.errors import BudgetError, StateError, TradyError, TradyWarning
from trady.memory.live import LiveBytes
from trady.optim import SGD, AdamW
from trady.planning.budget import InfeasibleBudgetError
from trady.report.units import format_bytes

#: Bytes by which a peak may pass its budget: rounding.
TOLERANCE = 64

STEPS = 5


class _Residual(nn.Module):
    """A transformer's feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's result to its input."""
        out: Tensor = x + self.narrow(F.gelu(self.wide(self.norm(x))))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and add the result to the input."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        out: Tensor = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _Text(nn.Module):
    """Token ids [N, T] to scores [N, 5]."""

    def __init__(self, width: int, depth: int, *, attends: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        kinds = [_Attention(width) if attends and i % 2 == 0 else _Residual(width) for i in range(depth)]
        self.blocks, self.head = nn.Sequential(*kinds), nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Classify."""
        scores: Tensor = self.head(self.blocks(self.embedding(ids)).mean(1))
        return scores


class _Recurrent(nn.Module):
    """Token ids [N, T] to scores [N, 5]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(50, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Classify by the last state."""
        scores: Tensor = self.head(self.lstm(self.embedding(ids))[0][:, -1])
        return scores


def _convolutions(norm: Callable[[int], nn.Module], activation: Callable[[], nn.Module], groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), norm(16), activation(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=groups), norm(32), activation(),
        nn.Conv2d(32, 32, 1), norm(32), activation(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), norm(64), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(48, width), nn.GELU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 5),
    )  # fmt: skip


#: What a model is made by, and what it reads.
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv, batch norm, ReLU6": (lambda: _convolutions(nn.BatchNorm2d, nn.ReLU6, 1), "image"),
    "grouped conv, batch norm, hardswish": (lambda: _convolutions(nn.BatchNorm2d, nn.Hardswish, 4), "image"),
    "conv, group norm, SiLU": (lambda: _convolutions(lambda n: nn.GroupNorm(4, n), nn.SiLU, 1), "image"),
    "perceptron": (lambda: _perceptron(128), "vector"),
    "feed-forward blocks": (lambda: _Text(64, 4, attends=False), "text"),
    "transformer": (lambda: _Text(64, 6, attends=True), "text"),
    "LSTM": (lambda: _Recurrent(64), "text"),
}
POLICIES = ("trady", "trady+", "dynamic-random", "static-random", "velocity", "head")
LOOPS = ("plain", "zero_grad after forward", "accumulate", "accumulate told", "two calls", "two calls told",
         "longer batches", "evaluate in the middle", "a larger last batch")  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.001),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.001),
    "sgd in backward": lambda parameters: SGD(parameters, lr=0.01),
    "adamw in backward": lambda parameters: AdamW(parameters, lr=0.001),
}


@dataclass(frozen=True)
class Combination:
    """What is tried.

    Attributes:
        number: Its place in the series.
        model: Key of :data:`MODELS`.
        samples: In a batch.
        size: Height and width of images, or length of sequences.
        share: Where the budget lies between the minimum and the peak of full fine-tuning.
        policy: By name.
        optimizer: Key of :data:`OPTIMIZERS`.
        loop: One of :data:`LOOPS`.
        autocast: Whether the loop runs under bf16 autocast; ``told`` where the plan is told.
        recompute: As for :func:`trady.prepare`.
        channels_last: Whether images and weights lie so.
        fidelity: As for :func:`trady.prepare`.
    """

    number: int
    model: str
    samples: int
    size: int
    share: float
    policy: str
    optimizer: str
    loop: str
    autocast: str
    recompute: str
    channels_last: bool
    fidelity: str


@dataclass(frozen=True)
class Outcome:
    """What happened.

    Attributes:
        combination: What was tried.
        status: ``kept``, ``refused`` (before a pass), ``exceeded``, ``impossible`` (no budget was found) or ``failed``.
        budget_bytes: The budget.
        peak_bytes: The highest peak of all steps.
        message: Of a refusal or an error.
    """

    combination: Combination
    status: str
    budget_bytes: int = 0
    peak_bytes: int = 0
    message: str = ""


def draw(number: int, seed: int) -> Combination:
    """Draw a combination: a function of its number and the seed."""
    chance = random.Random(f"{seed}/{number}")
    model = chance.choice(list(MODELS))
    return Combination(
        number, model, chance.choice((1, 2, 5, 8, 16)), chance.choice((8, 12, 20)), chance.random() ** 2,
        chance.choice(POLICIES), chance.choice(list(OPTIMIZERS)), chance.choice(LOOPS),
        chance.choice(("off", "off", "seen", "told")), chance.choice(("auto", "auto", "all", "none")),
        MODELS[model][1] == "image" and chance.random() < 0.25, chance.choice(("exact", "exact", "8bit", "4bit")),
    )  # fmt: skip


def batch_of(combination: Combination, generator: torch.Generator, *, longer: int = 1, fewer: int = 1) -> Tensor:
    """Make inputs, maybe with ``longer`` times the length and a ``fewer``-th of the samples."""
    samples, size = max(combination.samples // fewer, 1), combination.size * longer
    kind = MODELS[combination.model][1]
    if kind == "text":
        return torch.randint(50, (samples, size), generator=generator)
    if kind == "vector":
        return torch.randn(samples * longer, 48, generator=generator)
    x = torch.randn(samples, 3, size, size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last) if combination.channels_last else x


class Everything(LiveBytes):
    """Counts every tensor that has come since a first look, also those that no operation touches."""

    def __init__(self, before: Mapping[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self._known = before

    def look(self) -> None:
        """Count what is alive."""
        gc.collect()
        self.register([t for t in _tensors() if t.untyped_storage()._cdata not in self._known])


def storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages alive now; while they are held, nothing new has their addresses."""
    gc.collect()
    found = [t.untyped_storage() for t in _tensors()]
    return {storage._cdata: storage for storage in found}


def _tensors() -> list[Tensor]:
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return [t for t in tensors if t.layout == torch.strided and not t.is_meta]


def run_one(combination: Combination) -> Outcome:
    """Try a combination."""
    before = storages()
    torch.manual_seed(combination.number)
    generator = torch.Generator().manual_seed(combination.number)
    model = MODELS[combination.model][0]()
    if combination.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = batch_of(combination, generator)
    asked: dict[str, Any] = {"policy": combination.policy, "recompute": combination.recompute}
    asked["fidelity"] = combination.fidelity
    asked["calls_per_step"] = 2 if combination.loop == "two calls told" else 1
    asked["accumulates"] = combination.loop == "accumulate told"
    asked["autocast"] = torch.bfloat16 if combination.autocast == "told" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TradyWarning)
        try:
            least = _minimum(model, x, asked)
            most = trady.plan(copy.deepcopy(model), x, budget="1 TiB", **asked).predicted_peak_bytes or least
            budget = int(least + combination.share * max(most - least, 0)) + 1024
            tuner = trady.prepare(model, x, budget=f"{budget} B", **asked)
            optimizer = tuner.attach(OPTIMIZERS[combination.optimizer](tuner.parameters()))
        except BudgetError as error:
            return Outcome(combination, "impossible", message=str(error))
        except TradyError as error:
            return Outcome(combination, "failed", message=f"{type(error).__name__}: {error}")
        live = Everything(before)
        try:
            del x, model
            _train(combination, tuner, optimizer, generator, live)
        except BudgetError as error:
            status = "exceeded" if live.peak > budget + TOLERANCE else "refused"
            return Outcome(combination, status, budget, live.peak, str(error))
        except StateError as error:  # an optimizer that updates in the backward pass, and two backward passes a step
            return Outcome(combination, "refused", budget, live.peak, str(error))
        except Exception as error:  # a loop of this kind must not end in an error that says nothing
            return Outcome(combination, "failed", budget, live.peak, f"{type(error).__name__}: {error}")
    return Outcome(combination, "exceeded" if live.peak > budget + TOLERANCE else "kept", budget, live.peak)


def _minimum(model: nn.Module, x: Tensor, asked: dict[str, Any]) -> int:
    try:
        trady.plan(copy.deepcopy(model), x, budget="1 B", **asked)
    except InfeasibleBudgetError as error:
        return error.least_amount
    return 1


def _train(
    combination: Combination,
    tuner: trady.Tuner,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    live: Everything,
) -> None:
    model, loop = tuner.model, combination.loop
    if tuner.observation_due:
        _observe(tuner, batch_of(combination, generator), live)
    for step in range(STEPS):
        longer = (step > 1 and loop == "longer batches") or (step == STEPS - 1 and loop == "a larger last batch")
        fewer = 1 + (longer and loop == "longer batches")
        _train_on(combination, model, optimizer, batch_of(combination, generator, longer=1 + longer, fewer=fewer), live)
        if loop == "evaluate in the middle" and step == 2:
            _evaluate(model, batch_of(combination, generator), live)
        if step == 2 and combination.policy not in ("velocity", "head"):
            tuner.resample(1)


def _observe(tuner: trady.Tuner, x: Tensor, live: Everything) -> None:
    with live:
        live.look()
        tuner.observe([(x, torch.zeros(len(x), dtype=torch.int64))], F.cross_entropy)


def _train_on(
    combination: Combination, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, live: Everything
) -> None:
    labels = torch.arange(len(x)) % 5
    with live:
        live.look()
        _step(combination, model, optimizer, x, labels)


def _evaluate(model: nn.Module, x: Tensor, live: Everything) -> None:
    model.eval()
    with live, torch.no_grad():
        live.look()
        model(x)
    model.train()


def _step(
    combination: Combination, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor
) -> None:
    def loss_of(inputs: Tensor) -> Tensor:
        on = combination.autocast != "off"
        with torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext():
            return F.cross_entropy(model(inputs), labels)

    if combination.loop.startswith("accumulate"):
        for _ in range(2):
            (loss_of(x) / 2).backward()
    elif combination.loop.startswith("two calls"):
        (loss_of(x) + loss_of(x.flip(0))).backward()
    elif combination.loop == "zero_grad after forward":
        loss = loss_of(x)
        optimizer.zero_grad()
        loss.backward()
    else:
        loss_of(x).backward()
    optimizer.step()
    if combination.loop != "zero_grad after forward":
        optimizer.zero_grad()


def run(arguments: Sequence[str] | None = None) -> int:
    """Try the combinations; fail where a budget was exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_loops", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="combinations (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the combinations to try", metavar="N")
    add_json(parser)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    numbers = chosen.only or range(chosen.count)
    console = console_for(chosen.json)
    outcomes = [
        run_one(draw(number, chosen.seed))
        for number in track(numbers, "combinations", console=Console(stderr=True), disable=not console.is_terminal)
    ]
    counts = Counter(outcome.status for outcome in outcomes)
    console.print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    table = Table("n", "what", "budget", "peak", "message", title="exceeded or failed")
    for found in outcomes:
        if found.status in ("exceeded", "failed"):
            what = ", ".join(str(value) for value in list(asdict(found.combination).values())[1:])
            sizes = format_bytes(found.budget_bytes), f"{found.peak_bytes - found.budget_bytes:+d} B"
            table.add_row(str(found.combination.number), what, *sizes, found.message[:200])
    if table.row_count:
        console.print(table)
    write_json(chosen.json, {"counts": counts, "outcomes": [asdict(outcome) for outcome in outcomes]})
    return int(bool(counts["exceeded"] or counts["failed"]))


if __name__ == "__main__":
    main(run)

__all__ = ["Combination", "Outcome", "draw", "run_one"]
