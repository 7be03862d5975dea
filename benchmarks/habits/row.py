"""A kind of training code, run with a plain model and with a prepared one, and what became of both."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import trady
from trady.channels.selection import Selection
from trady.errors import StateError, TradyError, TradyWarning
from trady.ops.selected import channel_major
from trady.planning.budget import InfeasibleBudgetError

#: Bytes by which a peak may pass its budget: rounding.
TOLERANCE = 64

#: The largest relative difference that counts as equal.
ERRORS = {torch.float64: 1e-6, torch.float32: 1e-4}

Program = Callable[["Side"], None]


@dataclass(frozen=True)
class Row:
    """One kind of training code.

    Attributes:
        idiom: What people write, in a few words.
        program: A function that does it, whatever the model is.
        expected: ``equal``; ``kept``, where the plain run cannot follow and the budget alone is looked at; or
            ``refused``.
        says: A regular expression that the message of a refusal, or a warning on the way, matches.
    """

    idiom: str
    program: Program
    expected: str = "equal"
    says: str = ""


@dataclass(frozen=True)
class Outcome:
    """What happened to a row.

    Attributes:
        idiom: Of the row.
        expected: By the row.
        happened: ``equal``, ``kept``, ``refused: …``, ``differs: …`` or what else went wrong.
        error: Largest difference of a tensor from the plain run's, relative to its largest entry.
        budget_bytes: Where a step was measured.
        peak_bytes: The highest one.
        right: Whether it is as expected.
    """

    idiom: str
    expected: str
    happened: str
    error: float | None = None
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    right: bool = True


class Rows(list[Row]):
    """Rows that are written as functions."""

    def add(
        self, idiom: str, *, refused: str = "", told: str = "", expected: str = "equal"
    ) -> Callable[[Program], Program]:
        """Take in a program.

        Args:
            idiom: What it does.
            refused: Expect a refusal whose message matches.
            told: Expect a warning that matches.
            expected: As for :class:`Row`.
        """

        def take(program: Program) -> Program:
            self.append(Row(idiom, program, "refused" if refused else expected, refused or told))
            return program

        return take


class Side:
    """What a program is written against: the plain run or the prepared one.

    Args:
        recorded: For the plain run, what the prepared one has drawn: of every tuner, step by step.
    """

    def __init__(self, recorded: list[Recorded] | None = None) -> None:
        self.recorded: list[Recorded] = [] if recorded is None else recorded
        self.tuners: list[Any] = []
        self.results: dict[str, Tensor] = {}
        self.budget_bytes: int | None = None
        self.peaks: list[int] = []
        self._plain = recorded is not None

    def prepare(self, model: nn.Module, example: Any, *, over: float | None = None, **options: Any) -> Any:
        """Prepare the model, or mask its gradients.

        Args:
            model: Stays the one that is called.
            example: A batch.
            over: Asks for a peak budget of so many times the minimum, and lets :meth:`step` measure.
            options: Of :func:`trady.prepare`.
        """
        before = {name: value.clone() for name, value in model.state_dict().items()}
        if self._plain:
            tuner: Any = Masked(model, self.recorded[len(self.tuners)])
        else:
            if over is not None:
                self.budget_bytes = int(minimum(model, example, options) * over)
                options["budget"] = f"{self.budget_bytes} B"
            asked = {"budget": "elements:300", "policy": "static-random", "ranking": "structural", **options}
            tuner = trady.prepare(model, example, **asked)
            self.recorded.append(Recorded(before, tuner))
        self.tuners.append(tuner)
        seed(1)
        return tuner

    def step(self, run: Callable[[], Any]) -> None:
        """Run a training step; measure it where a budget was asked for."""
        if self._plain or self.budget_bytes is None:
            run()
        else:
            self.peaks.append(self.tuners[0].ledger(run, inference=False).peak_bytes)

    def pick(self, prepared: Any, plain: Any) -> Any:
        """Choose between what has no meaning without trady, and what stands for it."""
        return plain if self._plain else prepared

    def refused(self, run: Callable[[], Any], says: str) -> None:
        """Do what must be refused, before training goes on; the plain run leaves it out."""
        if self._plain:
            return
        try:
            run()
        except TradyError as error:
            if not re.search(says, str(error)):
                raise AssertionError(f"refused by {str(error)[:80]!r}, not by {says!r}") from error
        else:
            raise AssertionError(f"{says!r} was not refused")

    def result(self, name: str, tensor: Tensor) -> None:
        """Compare this as well."""
        self.results[name] = tensor.detach().clone()

    def end(self) -> dict[str, Tensor]:
        """Finish what is still prepared, and return everything that is to be equal."""
        found = dict(self.results)
        for number, tuner in enumerate(self.tuners):
            model = tuner.model
            with suppress(StateError):  # the program may have finished it
                tuner.finish()
            found |= {f"{number}.{name}": value.detach().clone() for name, value in model.state_dict().items()}
        return found


class Recorded:
    """What the prepared run has drawn for one model."""

    def __init__(self, before: dict[str, Tensor], tuner: trady.Tuner) -> None:
        self.before, self.tuner = before, tuner
        self.table = tuner.plan.table
        named = [name for name, _ in tuner.named_parameters()]
        self.head = [name for name in named if not name.endswith(".channels")]
        #: What was drawn at each step of any optimizer; the first is of the first step.
        self.steps: list[Selection] = []
        self.last = tuner.selection

    def note(self) -> None:
        """Remember what a step is about to train."""
        self.last = self.tuner.selection
        self.steps.append(self.last)

    def masks(self, step: int, model: nn.Module) -> dict[str, Tensor]:
        """Return what trains of each weight at a step."""
        drawn = self.steps[step] if step < len(self.steps) else self.last
        masks = {}
        for name, channels in drawn.items():
            layer, weight = self.table[name], model.get_parameter(self.table[name].parameter)
            mask = torch.zeros_like(weight, dtype=torch.bool)
            view = channel_major(mask, layer.kind, layer.groups)
            places = torch.from_numpy(np.asarray(channels).copy())
            view[places // view.shape[1], places % view.shape[1]] = True
            masks[layer.parameter] = mask
        return masks


class Masked:
    """A plain model of which only what the prepared one drew is trained: gradients are masked, the rest put back."""

    def __init__(self, model: nn.Module, recorded: Recorded) -> None:
        self.model, self._recorded, self._step = model, recorded, 0
        self._named = dict(model.named_parameters())
        self._masks = recorded.masks(0, model)
        drawn = {recorded.table[name].parameter for each in [recorded.last, *recorded.steps] for name in each}
        self._trains = {*drawn, *recorded.head}
        for name, parameter in self._named.items():
            parameter.requires_grad_(name in self._trains)
            if name in drawn and name not in recorded.head:
                parameter.register_hook(lambda gradient, name=name: self._masked(name, gradient))
        self._kept: dict[str, Tensor] = {}

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        mask = self._masks.get(name)
        return gradient * 0 if mask is None else gradient * mask

    def before_step(self) -> None:
        self._kept = {name: p.detach().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        for name, parameter in self._named.items():
            if name not in self._recorded.head:
                mask = self._masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                parameter.copy_(torch.where(mask, parameter, self._kept[name]))
        self._step += 1
        self._masks = self._recorded.masks(self._step, self.model)

    def attach(self, optimizer: Any) -> Any:
        return optimizer

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._named.items() if name in self._trains)

    def observe(self, batches: object, loss: object) -> None:
        pass

    def resample(self, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def finish(self) -> nn.Module:
        return self.model


def seed(number: int) -> None:
    """Seed everything that models draw from."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - models use it


def minimum(model: nn.Module, example: Any, options: dict[str, Any]) -> int:
    """Return the smallest peak budget in bytes."""
    try:
        trady.plan(copy.deepcopy(model), example, budget="1 B", **{"policy": "static-random", **options})
    except InfeasibleBudgetError as error:
        return error.least_amount
    raise AssertionError("1 B was no refusal")


@contextmanager
def _following(side: Side) -> Iterator[None]:
    """Note, or repeat, what each step of an optimizer trains."""

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tuner, recorded in zip(side.tuners, side.recorded, strict=False):
            if _updates(optimizer, tuner):  # else it is another's, or one that a prediction simulates
                tuner.before_step() if side._plain else recorded.note()

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tuner in side.tuners if side._plain else ():
            if _updates(optimizer, tuner):
                tuner.after_step()

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _updates(optimizer: torch.optim.Optimizer, tuner: Any) -> bool:
    trained = {id(p) for p in tuner.parameters()}
    return any(id(p) in trained for group in optimizer.param_groups for p in group["params"])


def _run(program: Program, side: Side) -> dict[str, Tensor]:
    seed(0)
    with _following(side):
        program(side)
    return side.end()


def try_row(row: Row) -> Outcome:
    """Run a row's program with a prepared model and with a plain one."""
    side = Side()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = _run(row.program, side)
        except TradyError as error:
            return _outcome(row, side, f"refused: {error}")
        except Exception as error:
            return _outcome(row, side, f"{type(error).__name__}: {error}")
        told = [" ".join(str(each.message).split()) for each in caught if issubclass(each.category, TradyWarning)]
        if row.says and row.expected != "refused" and not any(re.search(row.says, message) for message in told):
            return _outcome(row, side, f"nobody was told: {told}")
        try:
            expected = _run(row.program, Side(side.recorded))
        except Exception as error:
            return _outcome(row, side, f"the plain run ends in {type(error).__name__}: {error}")
    if found.keys() != expected.keys():
        return _outcome(row, side, f"results differ in {sorted(found.keys() ^ expected.keys())[:3]}")
    if untrained := _untrained(side, expected):
        return _outcome(row, side, untrained)
    worst = max(((_error(found[name], value), name) for name, value in expected.items()), default=(0.0, ""))
    equal = worst[0] <= ERRORS.get(expected[worst[1]].dtype, 1e-4)
    if row.expected == "kept":
        return _outcome(row, side, "kept")
    return _outcome(row, side, "equal" if equal else f"differs: {worst[1]}", worst[0])


def _untrained(side: Side, after: dict[str, Tensor]) -> str:
    """Name a model whose channels the plain run has left as they were: its row would show nothing."""
    for number, recorded in enumerate(side.recorded):
        weights = {recorded.table[name].parameter for name in recorded.last}
        if all(torch.equal(recorded.before[name], after[f"{number}.{name}"]) for name in weights or recorded.head):
            return f"no channel of model {number} trains"
    return ""


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference, largest = (found.to(wide) - expected.to(wide)).abs().max(), expected.to(wide).abs().max()
    return float(difference / largest.clamp_min(1e-12)) if difference.isfinite() else float("inf")


def _outcome(row: Row, side: Side, happened: str, error: float | None = None) -> Outcome:
    happened = " ".join(happened.split())
    peak = max(side.peaks, default=None)
    exceeded = peak is not None and side.budget_bytes is not None and peak > side.budget_bytes + TOLERANCE
    right = happened.startswith(row.expected) and not exceeded
    if row.expected == "refused":
        right = right and re.search(row.says, happened) is not None
    budget = None if peak is None else side.budget_bytes
    return Outcome(row.idiom, row.expected, happened, error, budget, peak, right)
